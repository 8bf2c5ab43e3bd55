"""Sequences and prefixes by the Triton kernels: one layer or several.

Notation: B sentences, R rows a sentence, N = B * R, T steps, M = steps of all rows together,
H hidden width, HP = H padded, U units a block, L layers, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusion_model.kernels.triton.configs import chip_of, padded, rows_plan
from fusion_model.kernels.triton.layout import Rows, pack
from fusion_model.kernels.triton.lstm_operator import Plan, lstm_rows
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

State = tuple[Tensor, Tensor]
TABLE_BYTES = 1 << 29  # of a table of input gates, at most


def _run(
    packed: Callable[[int], State],
    ids: Tensor | None,
    initial: State,
    dtype: torch.dtype,
    keep: Tensor | None,
    rows: Rows,
    shared: bool,
    save: bool,
) -> State:
    """h [N + M, H] and the last c [N, H] from initial rows [N, H]; see `lstm_rows`.

    `packed(units)` gives input gates and W_hh, packed for programs of so many units.
    """
    hidden, chip = initial[0].shape[1], chip_of(initial[0].device)
    how = rows_plan(chip, hidden, rows.batch, rows.count, dtype, rows.steps, save)
    x_gates, w = packed(how.units)
    h0, c0 = (F.pad(s, (0, w.shape[1] - hidden)) for s in initial)
    h0, c0 = h0.to(dtype).contiguous(), c0.float().contiguous()
    plan = Plan(rows.batch, rows.steps, how.units, shared, how.persistent, save)
    h, c, _, _ = lstm_rows(x_gates, ids, h0, c0, w, keep, [int(value) for value in plan])
    return h[:, :hidden], c[:, :hidden].to(dtype)


def _layer(
    x: Tensor,
    initial: State,
    weights: Sequence[Tensor],
    keep: Tensor | None,
    rows: Rows,
    shared: bool,
) -> State:
    """h [N + M, H] and the last c [N, H] of a layer, from inputs [*, D] and initial rows [N, H]."""
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *initial, *weights))
    packed = partial(_gates, x, weights)
    return _run(packed, None, initial, x.dtype, keep, rows, shared, save)


def _gates(x: Tensor, weights: Sequence[Tensor], units: int) -> State:
    """Input gates [*, 4 HP] of x [*, D], and W_hh [4 HP, HP], packed."""
    w_ih, w_hh, b_ih, b_hh = weights
    inner = F.pad(w_hh, (0, padded(w_hh.shape[1], units) - w_hh.shape[1]))
    gates = F.linear(x, pack(w_ih, units), pack(b_ih + b_hh, units))
    return gates, pack(inner, units).contiguous()


def _steps_first(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Inputs [B, T, D] as [T * B, D], and the mask as [T, B] uint8."""
    keep = None if mask is None else mask.t().to(torch.uint8).contiguous()
    return x.transpose(0, 1).flatten(0, 1), keep


steps_taken: list[int] = [0]  # by any optimiser: fused ones leave a weight's version as it was


def _count_step(*_: Any) -> None:
    steps_taken[0] += 1


register_optimizer_step_post_hook(_count_step)


def versions(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Changes when one of the tensors does."""
    found = ((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)
    return (steps_taken[0], *found)


_tables = WeakTensorKeyDictionary()  # embedding -> versions, {units: (table, W_hh packed)}


def can_be_tabled(embedding: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a table of all tokens' input gates costs less than the product for those at hand."""
    return len(embedding) * len(weights[0]) * embedding.element_size() <= TABLE_BYTES


def gate_table(embedding: Tensor, weights: Sequence[Tensor], units: int) -> State:
    """Input gates of every token, `embedding @ W_ih.T + biases`, [V, 4 HP], and W_hh, both packed.

    At inference a step's input is one token: a row of this table, and no product at all. It is
    made anew if a weight changed.
    """
    key = versions((embedding, *weights))
    if embedding not in _tables or _tables[embedding][0] != key:
        _tables[embedding] = key, {}
    kept: dict[int, State] = _tables[embedding][1]
    if units not in kept:
        kept[units] = _gates(embedding, weights, units)
    return kept[units]


@torch.no_grad()
def lstm_tokens(
    ids: Tensor,
    embedding: Tensor,
    state: State,
    weights: Sequence[Sequence[Tensor]],
    mask: Tensor | None = None,
) -> tuple[Tensor, State]:
    """As `fusion_model.kernels.lstm_tokens`, from a table of input gates."""
    batch, steps = ids.shape
    rows = Rows(batch, steps, 1)
    columns, keep = _steps_first(ids[:, :, None], mask)
    packed = partial(gate_table, embedding, weights[0])
    initial = state[0][:, 0], state[1][:, 0]
    columns = columns.view(steps, batch).contiguous()
    first = _run(packed, columns, initial, embedding.dtype, keep, rows, True, False)
    return _layers_above(first, rows, state, weights, keep, 0.0)


def _layers_above(
    first: State,
    rows: Rows,
    state: State,
    weights: Sequence[Sequence[Tensor]],
    keep: Tensor | None,
    dropout: float,
) -> tuple[Tensor, State]:
    """Output and final state of a sequence whose first layer is done."""
    batch, finals = rows.batch, [first]
    for layer, layer_weights in enumerate(weights[1:], start=1):
        below = finals[-1][0][batch:]
        below = F.dropout(below, dropout) if dropout else below
        initial = state[0][:, layer], state[1][:, layer]
        finals.append(_layer(below, initial, layer_weights, keep, rows, True))
    out = finals[-1][0][batch:].unflatten(0, (rows.steps, batch)).transpose(0, 1)
    return out, (
        torch.stack([h[-batch:] for h, _ in finals], 1),
        torch.stack([c for _, c in finals], 1),
    )


def lstm_sequence(
    x: Tensor,
    state: State,
    weights: Sequence[Sequence[Tensor]],
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, State]:
    """As `fusion_model.kernels.lstm_sequence`."""
    rows = Rows(x.shape[0], x.shape[1], 1)
    below, keep = _steps_first(x, mask)
    initial = state[0][:, 0], state[1][:, 0]
    first = _layer(below, initial, weights[0], keep, rows, True)
    return _layers_above(first, rows, state, weights, keep, dropout)


def prefix_lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Sequence[Tensor]],
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """As `fusion_model.kernels.prefix_lstm`."""
    batch, steps, _ = x.shape
    count = h0.shape[1]
    rows = Rows(batch, steps, count)
    below, keep = _steps_first(x, mask)
    initial = tuple(s.flip(1).transpose(0, 1).flatten(0, 1) for s in (h0, c0))
    for layer, layer_weights in enumerate(weights):
        if layer:
            below = F.dropout(below, dropout, dropout > 0)
        h, _ = _layer(below, (initial[0], initial[1]), layer_weights, keep, rows, layer == 0)
        below = h[batch * count :]
    # Row r is one of the last B rows that are active at its last step, T - R + r.
    r = torch.arange(count, device=x.device)
    ends = batch * (count * (steps - count) + (r + 1) * count - r * (r + 1) // 2)
    picked = (ends[:, None] - batch + torch.arange(batch, device=x.device)).flatten()
    return below.index_select(0, picked).unflatten(0, (count, batch)).transpose(0, 1)
