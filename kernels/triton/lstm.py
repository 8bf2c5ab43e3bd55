"""Sequences and prefixes by the Triton kernels: one layer or several.

Notation: B sentences, R rows a sentence, N = B * R, T steps, M = steps of all rows together,
H hidden width, HP = H padded, U units a block, L layers, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fusion_model.kernels.triton.configs import RowsPlan, chip_of, padded, rows_plan
from fusion_model.kernels.triton.layout import Rows, pack
from fusion_model.kernels.triton.lstm_operator import lstm_rows
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

State = tuple[Tensor, Tensor]
TABLE_BYTES = 1 << 29  # of a table of input gates, at most


def _pack_recurrent(w_hh: Tensor, units: int) -> Tensor:
    """W_hh [4H, H] as [4 HP, HP]."""
    hidden = w_hh.shape[1]
    return pack(F.pad(w_hh, (0, padded(hidden, units) - hidden)), units).contiguous()


def _run(
    x_gates: Tensor,
    ids: Tensor | None,
    w: Tensor,
    initial: State,
    keep: Tensor | None,
    rows: Rows,
    shared: bool,
    plan: RowsPlan,
    save: bool,
) -> State:
    """h [N + M, H] and the last c [N, H] from packed gates and weights; see `lstm_rows`."""
    hidden, kind = initial[0].shape[1], x_gates.dtype
    h0, c0 = (F.pad(s, (0, w.shape[1] - hidden)) for s in initial)
    h, c, _, _ = lstm_rows(
        x_gates,
        ids,
        h0.to(kind).contiguous(),
        c0.float().contiguous(),
        w,
        keep,
        rows.batch,
        rows.steps,
        shared,
        plan.units,
        plan.persistent,
        save,
    )
    return h[:, :hidden], c[:, :hidden].to(kind)


def _layer(
    x: Tensor,
    initial: State,
    weights: Sequence[Tensor],
    keep: Tensor | None,
    rows: Rows,
    shared: bool,
) -> State:
    """h [N + M, H] and the last c [N, H] of a layer, from inputs [*, D] and initial rows [N, H]."""
    w_ih, w_hh, b_ih, b_hh = weights
    given = (x, *initial, w_ih, w_hh, b_ih, b_hh)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    chip, hidden = chip_of(x.device), w_hh.shape[1]
    plan = rows_plan(chip, hidden, rows.batch, rows.count, x.dtype, rows.steps, save)
    x_gates = F.linear(x, pack(w_ih, plan.units), pack(b_ih + b_hh, plan.units))
    w = _pack_recurrent(w_hh, plan.units)
    return _run(x_gates, None, w, initial, keep, rows, shared, plan, save)


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
    w_ih, w_hh, b_ih, b_hh = weights
    key = versions((embedding, *weights))
    if embedding not in _tables or _tables[embedding][0] != key:
        _tables[embedding] = key, {}
    kept: dict[int, State] = _tables[embedding][1]
    if units not in kept:
        table = F.linear(embedding, pack(w_ih, units), pack(b_ih + b_hh, units))
        kept[units] = table, _pack_recurrent(w_hh, units)
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
    chip, hidden = chip_of(ids.device), weights[0][1].shape[1]
    plan = rows_plan(chip, hidden, batch, 1, embedding.dtype, steps, False)
    table, w = gate_table(embedding, weights[0], plan.units)
    initial = state[0][:, 0], state[1][:, 0]
    columns = columns.view(steps, batch).contiguous()
    first = _run(table, columns, w, initial, keep, rows, True, plan, False)
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
