"""Attention of many short texts at once, each within itself.

Texts, or trees of texts, lie one after the other as nodes [M, A, d]. Those of similar size share
a padded grid, whatever their exact size, and one pair of products. On the CPU, PyTorch's own
kernel spends most of its time on what surrounds such small products, and its softmax is slow
where a row is no multiple of the processor's vectors: here rows are padded to one.

Notation: N texts in a grid, Q query rows and K keys of each, A heads of width d.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_model.transfers import sent

if TYPE_CHECKING:
    from fusion_model.encoder_layers import EncoderLayers

LANES = 16  # float32 numbers in a vector
FEW_ROWS = 64  # for less, PyTorch's own kernel is as fast
MANY_KEYS = 128  # from here on, too
HIDDEN = -1e30  # a score that weighs nothing


@dataclass(frozen=True)
class Grid:
    """Neighbours that share a grid.

    Attributes:
        texts: the first of them, and the one after the last.
        rows: the first of their query rows, and the one after the last.
        queries: the query row in each place, [N, Q]; padding names any.
        keys: the node in each place, [N, K]; padding names any.
        places: where the query rows lie in the flattened grid, [R].
        bias: added to the scores, -inf where a key is hidden, as `prepared`.
    """

    texts: tuple[int, int]
    rows: tuple[int, int]
    queries: Tensor
    keys: Tensor
    places: Tensor
    bias: Tensor


def similar(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of neighbours that share a grid: little of it is padding."""
    found, first = [], 0
    for text, size in enumerate(sizes):
        if size > width_of(sizes[first]) or 4 * width_of(size) < 3 * width_of(sizes[first]):
            found.append((first, text))
            first = text
    return [*found, (first, len(sizes))] if sizes else found


def width_of(keys: int) -> int:
    """Keys with padding."""
    return -(-keys // LANES) * LANES


def padded_places(starts: Sequence[int], sizes: Sequence[int], width: int) -> np.ndarray:
    """Rows start, start + 1, … of each text, [N, width]; behind its size the first one again."""
    steps = np.arange(width)[None]
    inside = steps < np.asarray(sizes)[:, None]
    return np.asarray(starts)[:, None] + np.where(inside, steps, 0)


def make_grids(
    groups: Sequence[tuple[int, int]],
    queries: Sequence[int],
    sizes: Sequence[int],
    bias_of: Callable[[int, int, int, int], Tensor],
) -> list[Grid]:
    """Grids of all texts.

    Args:
        groups: what `similar` found.
        queries: query rows of each text.
        sizes: nodes of each text.
        bias_of: called with (first text, end, Q, K): the bias, see `Grid`.
    """
    starts = [0, *itertools.accumulate(sizes)]
    rows = [0, *itertools.accumulate(queries)]
    found = []
    for first, end in groups:
        most = max(queries[first:end])
        width = width_of(max(sizes[first:end]))
        bias = bias_of(first, end, most, width)
        places = [i * most + np.arange(count) for i, count in enumerate(queries[first:end])]
        parts = [
            padded_places(rows[first:end], queries[first:end], most),
            padded_places(starts[first:end], sizes[first:end], width),
            np.concatenate(places),
        ]
        ours, theirs, where = (sent(torch.from_numpy(part), bias.device) for part in parts)
        found.append(Grid((first, end), (rows[first], rows[end]), ours, theirs, where, bias))
    return found


def prepared(bias: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """A bias [N, 1 or A, Q, K] as `attend` adds it, once for all layers."""
    n, _, q, k = bias.shape
    if by_products(bias.device, n * q, k):
        return bias.expand(n, heads, q, k).reshape(n * heads, q, k)
    return bias.to(dtype)


def by_products(device: torch.device, rows: int, keys: int) -> bool:
    """Whether two plain products are faster than PyTorch's own kernel; measured."""
    return device.type == "cpu" and rows >= FEW_ROWS and keys <= MANY_KEYS


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention in a grid: query [N, Q, A, d], key and value [N, K, A, d] -> [N, Q, A, d].

    Args:
        bias: what `prepared` made. Scores are float32 whatever the type of the rest.
    """
    n, q, a, d = query.shape
    k = key.shape[1]
    if not by_products(query.device, n * q, k):
        parts = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return F.scaled_dot_product_attention(*parts, bias).transpose(1, 2)
    queries, keys, values = (_heads_first(part) for part in (query, key, value))
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=d**-0.5)
    found = torch.bmm(scores.softmax(-1), values)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out.copy_(found.view(n, a, q, d).transpose(1, 2))


def _heads_first(part: Tensor) -> Tensor:
    """[N, L, A, d] -> [N A, L, d] float32, in one pass."""
    n, length, a, d = part.shape
    out = torch.empty(n, a, length, d, dtype=torch.float32)
    return out.copy_(part.transpose(1, 2)).view(n * a, length, d)


def in_grid(nodes: Tensor, places: Tensor) -> Tensor:
    """Nodes [M, …] in the places [N, L] of a grid: [N, L, …]."""
    return nodes.index_select(0, places.flatten()).view(*places.shape, *nodes.shape[1:])


def of_grid(found: Tensor, grid: Grid) -> Tensor:
    """The reverse, without the padding: [N, Q, …] -> [R, …]."""
    return found.flatten(0, 1).index_select(0, grid.places)


class AllToAll:
    """Attention within texts that lie one after the other.

    Args:
        sizes: nodes of each text.
        layers: the encoder's; its bias of positions is added.
        dtype: of queries, keys and values.
        few: (layer, query rows of each text there), where not all of a text's nodes ask.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layers: "EncoderLayers",
        dtype: torch.dtype,
        few: tuple[int, int] | None = None,
    ) -> None:
        device, groups = layers.device, similar(sizes)
        self._sizes = sizes
        self._buffers: dict[int, _Buffers] = {}

        def bias_of(first: int, end: int, most: int, width: int) -> Tensor:
            own = sent(torch.tensor(sizes[first:end]), device)
            hidden = torch.arange(width, device=device) >= own[:, None]
            bias = torch.zeros(end - first, 1, most, width, device=device)
            bias.masked_fill_(hidden[:, None, None], -torch.inf)
            at = torch.arange(width, device=device)[None]
            relative = layers.position_bias(at[:, :most], at)
            return prepared(bias if relative is None else bias + relative, layers.heads, dtype)

        self._grids = make_grids(groups, sizes, sizes, bias_of)
        self._plain = layers.relative is None  # nothing but padding is hidden
        self._few_at = None if few is None else few[0]
        self._few = []
        if few is not None:
            self._few = make_grids(groups, [few[1]] * len(sizes), sizes, bias_of)

    def tensors(self) -> list[Tensor]:
        """All that a pass reads and that differs from pass to pass."""
        found = []
        for grid in (*self._grids, *self._few):
            found += [grid.queries, grid.keys, grid.places, grid.bias]
        return found

    def __call__(self, number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `EncoderLayers.run`; nodes after the last text are padding."""
        out = torch.empty_like(query)
        few = number == self._few_at
        grids = self._few if few else self._grids
        out[grids[-1].rows[1] :] = 0
        for at, grid in enumerate(grids):
            if not few and grid.bias.dim() == 3 and self._plain:
                if at not in self._buffers:
                    sizes = self._sizes[slice(*grid.texts)]
                    self._buffers[at] = _Buffers(grid.rows[0], sizes, *query.shape[1:])
                self._buffers[at].attend(query, key, value, out)
                continue
            parts = (
                in_grid(query, grid.queries),
                in_grid(key, grid.keys),
                in_grid(value, grid.keys),
            )
            first, end = grid.rows
            out[first:end] = of_grid(attend(*parts, grid.bias), grid)
        return out


class _Buffers:
    """`attend` for the texts of one grid, in memory that all layers share.

    Nodes are copied once a layer, equal lengths together, and the padding stays what it was made:
    one more number in each query and key hides it, so that no bias is added.

    Args:
        first: the first node.
        sizes: nodes of each text.
        heads, width: A and d.
    """

    def __init__(self, first: int, sizes: Sequence[int], heads: int, width: int) -> None:
        most = max(sizes)
        n, keys = len(sizes), width_of(most)
        self._query = torch.zeros(n, heads, most, width + 1)
        self._key = torch.zeros(n, heads, keys, width + 1)
        self._value = torch.zeros(n, heads, keys, width)
        self._query[..., width] = 1
        hidden = torch.arange(keys) >= torch.tensor(sizes)[:, None]
        self._key[..., width] = hidden[:, None] * HIDDEN
        self._scores = torch.empty(n * heads, most, keys)
        self._runs: list[tuple[int, int, int, int]] = []  # texts, their first node, size of each
        text = 0
        for size, equal in itertools.groupby(sizes):
            end = text + len(list(equal))
            self._runs.append((text, end, first, size))
            first, text = first + (end - text) * size, end

    def attend(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Write these texts' part of `out`, all [M, A, d]."""
        a, d = query.shape[1:]
        for text, end, first, size in self._runs:
            nodes = slice(first, first + (end - text) * size)
            for part, buffer in ((query, self._query), (key, self._key), (value, self._value)):
                from_nodes = part[nodes].view(end - text, size, a, d).transpose(1, 2)
                buffer[text:end, :, :size, :d].copy_(from_nodes)
        queries, keys, values = (b.flatten(0, 1) for b in (self._query, self._key, self._value))
        keys = keys.transpose(1, 2)
        scores = self._scores
        torch.baddbmm(scores, queries, keys, beta=0, alpha=d**-0.5, out=scores)
        found = torch.bmm(scores.softmax(-1), values).view(-1, a, queries.shape[1], d)
        for text, end, first, size in self._runs:
            nodes = slice(first, first + (end - text) * size)
            to_nodes = out[nodes].view(end - text, size, a, d)
            to_nodes.copy_(found[text:end, :, :size].transpose(1, 2))
