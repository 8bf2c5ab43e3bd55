"""Attention of many short texts at once, each within itself.

Texts, or trees of texts, lie one after the other as nodes [M, A, d]. Those of similar size share
a padded grid, whatever their exact size, and one call. On the CPU, PyTorch's kernel is slow where
a row of scores is no multiple of the processor's vectors: here keys are padded to one.

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

from fusion_model.encoders.transfers import sent

if TYPE_CHECKING:
    from fusion_model.encoders.layers import EncoderLayers

LANES = 16  # float32 numbers in a vector


@dataclass(frozen=True)
class Grid:
    """Neighbours that share a grid.

    Attributes:
        texts: the first of them, and the one after the last.
        rows: the first of their query rows, and the one after the last.
        queries: the query row in each place, [N, Q]; padding names any.
        keys: the node in each place, [N, K]; padding names any.
        places: where the query rows lie in the flattened grid, [R].
        bias: added to the scores, -inf where a key is hidden,
            [N, 1 or A, Q, K].
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


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention in a grid: query [N, Q, A, d], key and value [N, K, A, d] -> [N, Q, A, d]."""
    parts = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(*parts, bias).transpose(1, 2)


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

        def bias_of(first: int, end: int, most: int, width: int) -> Tensor:
            own = sent(torch.tensor(sizes[first:end]), device)
            hidden = torch.arange(width, device=device) >= own[:, None]
            bias = torch.zeros(end - first, 1, most, width, device=device)
            bias.masked_fill_(hidden[:, None, None], -torch.inf)
            at = torch.arange(width, device=device)[None]
            relative = layers.position_bias(at[:, :most], at)
            return (bias if relative is None else bias + relative).to(dtype)

        self._grids = make_grids(groups, sizes, sizes, bias_of)
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
        grids = self._few if number == self._few_at else self._grids
        out[grids[-1].rows[1] :] = 0
        for grid in grids:
            parts = (
                in_grid(query, grid.queries),
                in_grid(key, grid.keys),
                in_grid(value, grid.keys),
            )
            first, end = grid.rows
            out[first:end] = of_grid(attend(*parts, grid.bias), grid)
        return out
