"""Attention along trees of nodes (`fusion_model.encoders.incremental.trees`), and sums along them.

Whole sentences share padded grids. Texts that go on from a stream's past read keys and values
where they lie: a sequence's slots follow one another wherever possible, so that on the CPU a step
copies nothing of the past, and no sequence is padded to another's length. On a GPU, where calls
cost more than bytes, they share a grid, too.

Notation: as in `fusion_model.encoders.attention`; a tree has P past nodes.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_model.encoders.attention import (
    LANES,
    attend,
    in_grid,
    make_grids,
    of_grid,
    similar,
    width_of,
)
from fusion_model.encoders.incremental.trees import Grid, Tree
from fusion_model.encoders.layers import EncoderLayers
from fusion_model.encoders.transfers import sent

if TYPE_CHECKING:
    from fusion_model.encoders.incremental.cache import NodePool


def coarse(past: int) -> int:
    """Places for a past on a GPU: few sizes occur, so that passes are replayed (`Graphs`)."""
    return 2 ** max(past - 1, LANES - 1).bit_length() if past else 0


class AlongTrees:
    """Attention within trees that lie one after the other, with their past.

    Args:
        trees: largest first, past included.
        plans: what is computed of each.
        positions: of each node, [M].
        layers: the encoder's.
        dtype: of queries, keys and values.
        pool: holds the trees' past; gets keys and values of trees that name slots.

    Attributes:
        starts: the first node of each tree.
        seen: how many nodes each node sees, [M].
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        plans: Sequence[Grid],
        positions: Tensor,
        layers: EncoderLayers,
        dtype: torch.dtype,
        pool: "NodePool | None",
    ) -> None:
        self._trees, self._plans, self._pool = trees, plans, pool
        self._layers, self._dtype, self._positions = layers, dtype, positions
        self._sizes = [len(plan.tokens) for plan in plans]
        self.starts = [0, *itertools.accumulate(self._sizes)][:-1]
        seen = np.concatenate(
            [plan.sees.sum(1) + len(tree.past) for tree, plan in zip(trees, plans, strict=True)]
        )
        device = positions.device
        self.seen = sent(torch.from_numpy(seen), device)
        if pool is not None:
            self._slots, self._nodes = pool.targets(trees, self.starts)
            pool.positions[self._slots] = positions[self._nodes]
            last = [tree.past[-1] if tree.past else -1 for tree in trees]
            self._before = sent(torch.tensor(np.repeat(last, self._sizes)), device)
        # Where calls cost more than bytes, a stream's sequences share one grid of few sizes.
        self._calls = pool is not None and (device.type != "cpu" or pool.graphs is not None)
        self._each = pool is not None and not self._calls and all(t.past for t in trees)
        if self._each:
            self._paths = [self._path(number) for number in range(len(trees))]
        else:
            self._past: list[Tensor] = []
            self._sees: list[Tensor] = []
            totals = [len(t.past) + size for t, size in zip(trees, self._sizes, strict=True)]
            groups = [(0, len(trees))] if self._calls else similar(totals)
            self._grids = make_grids(groups, self._sizes, self._sizes, self._bias)

    def __call__(self, number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `EncoderLayers.run`; nodes after the last tree are padding."""
        pool = self._pool
        if pool is not None:
            pool.keys[number][self._slots] = key[self._nodes]
            pool.values[number][self._slots] = value[self._nodes]
        out = torch.zeros_like(query)
        if self._each:
            assert pool is not None
            for path in self._paths:
                path.attend(pool.keys[number], pool.values[number], query, key, value, out)
            return out
        for at, grid in enumerate(self._grids):
            keys, values = in_grid(key, grid.keys), in_grid(value, grid.keys)
            if pool is not None:
                keys = torch.cat([in_grid(pool.keys[number], self._past[at]), keys], dim=1)
                values = torch.cat([in_grid(pool.values[number], self._past[at]), values], dim=1)
            found = attend(in_grid(query, grid.queries), keys, values, grid.bias)
            out[grid.rows[0] : grid.rows[1]] = of_grid(found, grid)
        return out

    def tensors(self) -> list[Tensor]:
        """All that a pass over grids reads and that differs from pass to pass."""
        own = [] if self._pool is None else [self._slots, self._nodes, self._before]
        for grid, past, sees in zip(self._grids, self._past, self._sees, strict=True):
            own += [grid.queries, grid.keys, grid.places, grid.bias, past, sees]
        return own

    def sums(self, output: Tensor, number: int) -> Tensor:
        """Of a layer's output [M, E], over what each node sees, [M, E] float32.

        Args:
            number: of the layer among those whose sums the pool keeps.
        """
        output, count = output.float(), sum(self._sizes)
        if self._each:
            total = output[:count].clone()
            for start, size, plan in zip(self.starts, self._sizes, self._plans, strict=True):
                if size > 1:
                    own = output[start : start + size]
                    total[start : start + size] = torch.from_numpy(plan.sees).float() @ own
        else:
            total = output.new_empty(count, output.shape[1])
            for grid, sees in zip(self._grids, self._sees, strict=True):
                found = sees @ in_grid(output, grid.keys)
                total[grid.rows[0] : grid.rows[1]] = of_grid(found, grid)
        if self._pool is not None:
            before = self._pool.sums[self._before, number]
            total += torch.where(self._before[:, None] >= 0, before, 0)
            self._pool.sums[self._slots, number] = total[self._nodes]
        return total

    def _bias(self, first: int, end: int, most: int, width: int) -> Tensor:
        """See `make_grids`; notes what the trees of this grid see, and their past."""
        trees, plans = self._trees[first:end], self._plans[first:end]
        past = max(len(tree.past) for tree in trees)
        past = coarse(past) if self._calls else width_of(past)
        sees = np.zeros((len(trees), most, past + width), dtype=bool)
        slots = np.zeros((len(trees), past), dtype=np.int64)
        at = np.zeros((len(trees), width), dtype=np.int64)
        for row, (tree, plan) in enumerate(zip(trees, plans, strict=True)):
            size = len(plan.tokens)
            sees[row, :size, : len(tree.past)] = True
            sees[row, :size, past : past + size] = plan.sees
            sees[row, size:, past] = True  # padding has to see something
            slots[row, : len(tree.past)] = tree.past
            at[row, :size] = plan.positions
        device = self._positions.device
        own = sent(torch.from_numpy(sees), device)
        keys_at = sent(torch.from_numpy(at), device)
        queries_at = keys_at[:, :most]
        self._past.append(sent(torch.from_numpy(slots), device))
        if self._pool is not None:
            keys_at = torch.cat([self._pool.positions[self._past[-1]], keys_at], dim=1)
        self._sees.append(own[:, :, past:].float())
        bias = torch.zeros(own.shape, device=device).masked_fill_(~own, -torch.inf)[:, None]
        relative = self._layers.position_bias(queries_at, keys_at)
        return (bias if relative is None else bias + relative).to(self._dtype)

    def _path(self, number: int) -> "_Path":
        tree, plan = self._trees[number], self._plans[number]
        start, size = self.starts[number], self._sizes[number]
        kept = len(tree.slots)
        bias = None
        if size > 1:
            sees = np.concatenate([np.ones((size, len(tree.past)), dtype=bool), plan.sees], axis=1)
            bias = torch.zeros(sees.shape).masked_fill_(~torch.from_numpy(sees), -torch.inf)
        assert self._pool is not None
        at = torch.tensor(plan.positions)[None]
        past_at = self._pool.positions[torch.tensor(tree.past)][None]
        relative = self._layers.position_bias(at, torch.cat([past_at, at], dim=1))
        if relative is not None:
            bias = relative[0] if bias is None else relative[0] + bias
        return _Path(
            [*tree.past, *tree.slots],
            (start, start + size),
            size - kept,
            None if bias is None else bias.to(self._dtype),
        )


class _Path:
    """One tree and its past, read where they lie.

    Args:
        slots: of the past and of the nodes that are kept.
        nodes: the tree's first node, and the one after its last.
        others: how many of them, at the end, have no slot.
        bias: [Q, K] or [A, Q, K]; None where all see all.
    """

    def __init__(
        self, slots: list[int], nodes: tuple[int, int], others: int, bias: Tensor | None
    ) -> None:
        self._in_a_row = slots[-1] - slots[0] + 1 == len(slots) and slots == sorted(slots)
        self._run = slice(slots[0], slots[-1] + 1)
        self._slots = torch.tensor([] if self._in_a_row else slots, dtype=torch.int64)
        self._nodes, self._others, self._bias = nodes, others, bias

    def attend(
        self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        """Write this tree's part of `out`; `keys` and `values` are the pool's."""
        first, end = self._nodes
        parts = query[first:end], self._all(keys, key), self._all(values, value)
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        found = F.scaled_dot_product_attention(q, k, v, self._bias)
        out[first:end] = found[0].transpose(0, 1)

    def _all(self, held: Tensor, new: Tensor) -> Tensor:
        part = held[self._run] if self._in_a_row else held.index_select(0, self._slots)
        end = self._nodes[1]
        return torch.cat([part, new[end - self._others : end]]) if self._others else part
