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
            (b, bias_of(b.sees, asked[b.queries], at[b.keys], self._layers))
            for b in make_buckets(self._trees, asking, at.device)
        ]

    def __call__(self, number: int, query: Tensor, seen: Tensor) -> Tensor:
        """See `EncoderLayers.run`; nodes after the last tree are padding."""
        out = torch.zeros_like(query)
        for bucket, bias in self._all if len(query) == len(seen) else self._few:
            q = in_bucket(query, bucket.queries).transpose(1, 2)
            k, v = (in_bucket(part, bucket.keys).transpose(1, 2) for part in seen.unbind(1))
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


def bias_of(sees: Tensor, asked: Tensor, keys: Tensor, layers: EncoderLayers) -> Tensor:
    """What is added to scores, [N, 1 or A, Q, K]: -inf where a key is hidden.

    Args:
        sees: [N, Q, K] bool.
        asked, keys: positions, [N, Q] and [N, K].
    """
    bias = torch.zeros(sees.shape, device=sees.device).masked_fill_(~sees, -torch.inf)[:, None]
    relative = layers.position_bias(asked, keys)
    return (bias if relative is None else bias + relative).to(layers.dtype)


class CachedAttention:
    """Attention of paths that go on from cached texts; see `TreeAttention`.

    Args:
        trees, flats: each, without branches, and its nodes.
        entries: of each tree, with room; it gets what is computed.
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
            past, size = len(tree.past), len(flat.tokens)
            rows, held = slice(start, start + size), slice(past, past + len(tree))
            sees = bias = None
            if size > 1:
                sees = torch.from_numpy(flat.sees).to(positions.device)
            if sees is not None or layers.relative is not None:
                seen = positions.new_ones((1, size, past + size), dtype=torch.bool)
                if sees is not None:
                    seen[0, :, past:] = sees
                keys = positions.new_tensor([*tree.past, *flat.positions])[None]
                bias = bias_of(seen, keys[:, past:], keys, layers)
            (end,) = flat.nodes["mean"]
            count = past + (1 if size == 1 else int(flat.sees[end].sum()))
            self._parts.append(_Part(entry, rows, held, end, count, sees, bias))
            start = rows.stop

    def __call__(self, number: int, query: Tensor, seen: Tensor) -> Tensor:
        """See `EncoderLayers.run`."""
        found = []
        for part in self._parts:
            with_past = part.with_past(part.entry.states[2 * number : 2 * number + 2], seen)
            keys, values = with_past.transpose(1, 2)[:, None]
            q = query[part.rows].transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(q, keys, values, part.bias)
            found.append(attended[0].transpose(0, 1))
        spare = len(query) - self._parts[-1].rows.stop
        if spare:
            found.append(query.new_zeros(spare, *query.shape[1:]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def mean(self, number: int, output: Tensor) -> Tensor:
        """As `TreeAttention.mean`; `number` is the layer's among those whose sums are kept."""
        found = []
        for part in self._parts:
            sums, past, total = part.entry.sums, part.held.start, output[part.rows].float()
            if part.sees is not None:
                total = part.sees.float() @ total
            if past:
                total = total + sums[past - 1, number]
            sums[part.held, number] = total[: part.held.stop - past]
            found.append(total[part.end, None] / part.seen)
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True)
class _Part:
    """A path that goes on: its nodes are `rows` of the pass; the first of these, all but queries,
    are kept, at `held` of the entry. Its text ends at node `end`, which sees so many. `sees`
    [L, L], None for a single node, is without the past, `bias` with it."""

    entry: Entry
    rows: slice
    held: slice
    end: int
    seen: int
    sees: Tensor | None
    bias: Tensor | None

    def with_past(self, held: Tensor, new: Tensor) -> Tensor:
        """Keys and values that the nodes see, [2, P + L, A, d]; those of the `new` [M, 2, A, d]
        that are kept are written to `held` [2, room, A, d]."""
        new, kept = new[self.rows].transpose(0, 1), self.held.stop - self.held.start
        held[:, self.held] = new[:, :kept]
        if kept == new.shape[1]:  # they now lie behind their past
            return held[:, : self.held.stop]
        return torch.cat([held[:, : self.held.start], new], dim=1)
