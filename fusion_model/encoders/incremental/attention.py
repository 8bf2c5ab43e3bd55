"""Attention along trees of nodes (`fusion_model.encoders.incremental.trees`), and means along them.

Whole texts and trees of them lie one after the other as nodes. Those of similar size share a
padded bucket, whatever their exact size, and one call. On the CPU, PyTorch's kernel is slow where
a row of scores is no multiple of the processor's vectors: here keys are padded to one. Texts that
go on read keys and values where they are cached.

Notation: M nodes in all; N trees in a bucket, Q query rows and K keys of each; A heads of width d,
E = A d.
"""

import itertools
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
        """Buckets, each with what is added to its scores, [N, 1 or A, Q, K]: -inf where a key is
        hidden. `nodes` [R] are those that ask."""
        at, found = self._positions, []
        for bucket in make_buckets(self._trees, asking, at.device):
            bias = torch.zeros(bucket.sees.shape, device=at.device)
            bias = bias.masked_fill_(~bucket.sees, -torch.inf)[:, None]
            asked = nodes.to(at.device)[bucket.queries]
            relative = self._layers.position_bias(at[asked], at[bucket.keys])
            bias = bias if relative is None else bias + relative
            found.append((bucket, bias.to(self._layers.dtype)))
        return found

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


class CachedAttention:
    """Attention of trees that go on from cached texts. The entries get what is computed on the way
    to each tree's deepest node; see `TreeAttention`.

    Args:
        trees, flats: each, and its nodes.
        entries: of each tree, with room for these.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        flats: Sequence[FlatTree],
        positions: Tensor,
        layers: EncoderLayers,
        entries: Sequence[Entry],
    ) -> None:
        self._trees, self._flats, self._entries = trees, flats, entries
        ends = list(itertools.accumulate(len(flat.tokens) for flat in flats))
        self._rows = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self._kept: list[list[int] | slice] = []
        self._sees: list[Tensor] = []
        self._bias: list[Tensor | None] = []
        for tree, flat, own in zip(trees, flats, self._rows, strict=True):
            kept = tree.deepest()
            in_a_row = kept == [*range(len(kept))]
            self._kept.append(slice(len(kept)) if in_a_row else kept)
            sees = torch.from_numpy(np.pad(flat.sees, ((0, 0), (tree.past, 0)), constant_values=1))
            self._sees.append(sees.to(positions.device))
            bias = None if sees.all() else torch.zeros(sees.shape)
            if bias is not None:
                bias = bias.masked_fill_(~sees, -torch.inf).to(positions.device)
            if layers.relative is not None:
                bias = self._relative(tree, positions[own], layers, bias)
            self._bias.append(None if bias is None else bias.to(layers.dtype))

    def _relative(
        self, tree: Tree, at: Tensor, layers: EncoderLayers, bias: Tensor | None
    ) -> Tensor:
        head = len(self._entries[len(self._bias)].head) if tree.past else 0
        behind = range(tree.depth - (tree.past - head), tree.depth) if tree.past else ()
        past = torch.tensor([*range(head), *behind], dtype=at.dtype, device=at.device)
        relative = layers.position_bias(at[None], torch.cat([past, at])[None])
        assert relative is not None
        return relative[0] if bias is None else relative[0] + bias

    def __call__(self, number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `EncoderLayers.run`."""
        out = torch.zeros_like(query)
        for i, entry in enumerate(self._entries):
            own = self._rows[i]
            all_keys = self._with_past(i, entry.states[2 * number], key)
            all_values = self._with_past(i, entry.states[2 * number + 1], value)
            parts = query[own], all_keys, all_values
            q, k, v = (part.transpose(0, 1)[None] for part in parts)
            found = F.scaled_dot_product_attention(q, k, v, self._bias[i])
            out[own] = found[0].transpose(0, 1)
        return out

    def _with_past(self, i: int, held: Tensor, new: Tensor) -> Tensor:
        """Keys or values that a tree's nodes see; those that are kept are written now."""
        past, new = self._trees[i].past, new[self._rows[i]]
        kept = new[self._kept[i]]
        held[past : past + len(kept)] = kept
        if len(kept) == len(new):  # one path: it now lies behind its past
            return held[: past + len(new)]
        return torch.cat([held[:past], new])

    def mean(self, number: int, output: Tensor) -> Tensor:
        """As `TreeAttention.mean`; `number` is the layer's among those whose sums are kept."""
        found = []
        for tree, flat, entry, own, sees, kept in zip(
            *(self._trees, self._flats, self._entries, self._rows, self._sees, self._kept),
            strict=True,
        ):
            total = sees[:, tree.past :].float() @ output[own].float()
            if tree.past:
                total += entry.sums[tree.past - 1, number]
            new = total[kept]
            entry.sums[tree.past : tree.past + len(new), number] = new
            ends = flat.nodes["mean"]
            found.append(total[ends] / sees[ends].sum(-1, keepdim=True))
        return torch.cat(found)
