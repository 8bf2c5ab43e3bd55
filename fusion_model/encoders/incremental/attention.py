"""Attention along trees of nodes (`fusion_model.encoders.incremental.trees`), and means along them.

Whole texts and trees of them lie one after the other as nodes. Those of similar size share a
padded bucket, whatever their exact size, and one call. On the CPU, PyTorch's kernel is slow where
a row of scores is no multiple of the processor's vectors: here keys are padded to one. Texts that
go on read keys and values where they are cached.

Notation: M nodes in all; N trees in a bucket, Q query rows and K keys of each; A heads of width d,
E = A d.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_model.encoders.incremental.cache import Entry
from fusion_model.encoders.incremental.trees import FlatTree, Tree
from fusion_model.encoders.layers import EncoderLayers

LANES = 16  # float32 numbers in a vector


@dataclass(frozen=True)
class Bucket:
    """Neighbours of similar size.

    Attributes:
        rows: of all query rows, the bucket's.
        queries: the query row in each place, [N, Q]; padding names any.
        keys: the node in each place, [N, K]; padding names any.
        places: where the query rows lie in the flattened bucket, [R].
        sees: which keys each query reads, at least one, [N, Q, K] bool.
    """

    rows: slice
    queries: Tensor
    keys: Tensor
    places: Tensor
    sees: Tensor

    def result(self, found: Tensor) -> Tensor:
        """Without the padding: [N, Q, …] -> [R, …]."""
        return found.flatten(0, 1).index_select(0, self.places)


def in_bucket(nodes: Tensor, places: Tensor) -> Tensor:
    """Nodes [M, …] in the places [N, L] of a bucket: [N, L, …]."""
    return nodes.index_select(0, places.flatten()).view(*places.shape, *nodes.shape[1:])


def similar(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of neighbours that share a bucket: little of it is padding."""
    found, first = [], 0
    for text, size in enumerate(sizes):
        if size > width_of(sizes[first]) or 4 * width_of(size) < 3 * width_of(sizes[first]):
            found.append((first, text))
            first = text
    return [*found, (first, len(sizes))] if sizes else found


def width_of(keys: int) -> int:
    """Keys with padding."""
    return -(-keys // LANES) * LANES


def make_buckets(
    trees: Sequence[FlatTree], asking: Sequence[Sequence[int]], device: torch.device
) -> list[Bucket]:
    """Buckets of all trees, which lie one after the other.

    Args:
        asking: the nodes of each tree that ask; their query rows lie one after the other, too.
    """
    sizes = [len(tree.tokens) for tree in trees]
    starts = np.cumsum([0, *sizes])
    rows = np.cumsum([0, *map(len, asking)])
    found = []
    for first, end in similar(sizes):
        most, width = max(map(len, asking[first:end])), width_of(max(sizes[first:end]))
        sees = np.zeros((end - first, most, width), dtype=bool)
        sees[:, :, 0] = True  # padding has to see something
        for own, tree, nodes in zip(sees, trees[first:end], asking[first:end], strict=True):
            own[: len(nodes), : len(tree.tokens)] = tree.sees[nodes]
        counts = np.diff(rows[first : end + 1])
        inside = np.arange(most) < counts[:, None]
        parts = (
            np.where(inside, rows[first:end, None] + np.arange(most), rows[first]),
            np.minimum(starts[first:end, None] + np.arange(width), starts[-1] - 1),
            np.flatnonzero(inside),
            sees,
        )
        on_device = (torch.from_numpy(part).to(device) for part in parts)
        found.append(Bucket(slice(rows[first], rows[end]), *on_device))
    return found


class TreeAttention:
    """Attention within trees that lie one after the other.

    Args:
        trees: largest first.
        positions: of each node, [M].
        layers: the encoder's.
        rows: of the last layer that is computed these nodes ask only, rising, [R].
    """

    def __init__(
        self,
        trees: Sequence[FlatTree],
        positions: Tensor,
        layers: EncoderLayers,
        rows: np.ndarray | None = None,
    ) -> None:
        self._trees, self._positions, self._layers = trees, positions, layers
        sizes = [len(tree.tokens) for tree in trees]
        self._all = self._with_bias([range(size) for size in sizes], torch.arange(sum(sizes)))
        self._few = []
        if rows is not None:
            ends = np.cumsum(sizes)
            of_trees = np.split(rows, np.searchsorted(rows, ends[:-1]))
            starts = ends - sizes
            asking = [own - start for own, start in zip(of_trees, starts, strict=True)]
            self._few = self._with_bias(asking, torch.from_numpy(rows))

    def _with_bias(
        self, asking: Sequence[Sequence[int]], nodes: Tensor
    ) -> list[tuple[Bucket, Tensor]]:
        """Buckets with what is added to their scores; `nodes` [R] are those that ask."""
        at, asked = self._positions, self._positions[nodes.to(self._positions.device)]
        return [
            (b, _bias(b.sees, asked[b.queries], at[b.keys], self._layers))
            for b in make_buckets(self._trees, asking, at.device)
        ]

    def __call__(self, number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `EncoderLayers.run`; nodes after the last tree are padding."""
        out = torch.zeros_like(query)
        for bucket, bias in self._all if len(query) == len(key) else self._few:
            q = in_bucket(query, bucket.queries).transpose(1, 2)
            k, v = (in_bucket(part, bucket.keys).transpose(1, 2) for part in (key, value))
            found = F.scaled_dot_product_attention(q, k, v, bias)
            out[bucket.rows] = bucket.result(found.transpose(1, 2))
        return out

    def mean(self, number: int, output: Tensor) -> Tensor:
        """Of a layer's output [M, E], over what each text's end sees, [texts, E] float32."""
        found = []
        ends = [tree.nodes["mean"] for tree in self._trees]
        for bucket in make_buckets(self._trees, ends, output.device):
            sees = bucket.sees.float()
            mean = sees @ in_bucket(output, bucket.keys).float() / sees.sum(-1, keepdim=True)
            found.append(bucket.result(mean))
        return torch.cat(found)


def _bias(sees: Tensor, asked: Tensor, keys: Tensor, layers: EncoderLayers) -> Tensor:
    """What is added to scores, [N, 1 or A, Q, K]: -inf where a key is hidden.

    Args:
        sees: [N, Q, K] bool.
        asked, keys: positions, [N, Q] and [N, K].
    """
    bias = torch.zeros(sees.shape, device=sees.device).masked_fill_(~sees, -torch.inf)[:, None]
    relative = layers.position_bias(asked, keys)
    return (bias if relative is None else bias + relative).to(layers.dtype)


class CachedAttention:
    """Attention of trees that go on from cached texts; see `TreeAttention`.

    Args:
        trees, flats: each, and its nodes.
        entries: of each tree, with room; it gets what is computed on the way to the deepest node.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        flats: Sequence[FlatTree],
        positions: Tensor,
        layers: EncoderLayers,
        entries: Sequence[Entry],
    ) -> None:
        self._parts: list[_Part] = []
        start = 0
        for tree, flat, entry in zip(trees, flats, entries, strict=True):
            past, rows = len(tree.past), slice(start, start + len(flat.tokens))
            sees = torch.from_numpy(np.pad(flat.sees, ((0, 0), (past, 0)), constant_values=True))
            bias = None
            if layers.relative is not None or not sees.all():
                keys = positions.new_tensor([*tree.past, *flat.positions])[None]
                bias = _bias(sees.to(keys.device)[None], keys[:, past:], keys, layers)
            kept = tree.deepest()
            in_a_row = kept == [*range(len(kept))]
            nodes = slice(len(kept)) if in_a_row else kept
            held = slice(past, past + len(kept))
            self._parts.append(_Part(flat, entry, rows, nodes, held, sees, bias))
            start = rows.stop

    def __call__(self, number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `EncoderLayers.run`."""
        out = torch.zeros_like(query)
        for part in self._parts:
            keys = part.with_past(part.entry.states[2 * number], key[part.rows])
            values = part.with_past(part.entry.states[2 * number + 1], value[part.rows])
            q, k, v = (x.transpose(0, 1)[None] for x in (query[part.rows], keys, values))
            found = F.scaled_dot_product_attention(q, k, v, part.bias)
            out[part.rows] = found[0].transpose(0, 1)
        return out

    def mean(self, number: int, output: Tensor) -> Tensor:
        """As `TreeAttention.mean`; `number` is the layer's among those whose sums are kept."""
        found = []
        for part in self._parts:
            sums, sees, past = part.entry.sums, part.sees.to(output.device), part.held.start
            total = sees[:, past:].float() @ output[part.rows].float()
            if past:
                total += sums[past - 1, number]
            sums[part.held, number] = total[part.nodes]
            ends = part.flat.nodes["mean"]
            found.append(total[ends] / sees[ends].sum(-1, keepdim=True))
        return torch.cat(found)


@dataclass(frozen=True)
class _Part:
    """A tree that goes on: its nodes are `rows` of the pass, `nodes` of these are kept, at `held`
    of the entry; `sees` [L, P + L] and `bias` are of its past, too."""

    flat: FlatTree
    entry: Entry
    rows: slice
    nodes: slice | list[int]
    held: slice
    sees: Tensor
    bias: Tensor | None

    def with_past(self, held: Tensor, new: Tensor) -> Tensor:
        """Keys or values that the nodes see, those `new` that are kept written to `held`."""
        held[self.held] = new[self.nodes]
        if self.held.stop - self.held.start == len(new):  # one path: it now lies behind its past
            return held[: self.held.stop]
        return torch.cat([held[: self.held.start], new])
