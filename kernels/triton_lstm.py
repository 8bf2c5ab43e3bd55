"""One LSTM layer as an operator with a gradient, by whichever Triton kernel fits, and its users.

The operator runs rows of one layer: a sequence is one row a sentence, all prefixes are R rows a
sentence (see `fusion_model.kernels.triton_rows`). Weights and input gates are packed, so that what
a program needs lies together; packing is plain PyTorch and differentiable.

Notation: B sentences, R rows a sentence, N = B * R, T steps, M = steps of all rows together,
H hidden width, HP = H padded, U units a block, L layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fusion_model.kernels.triton_launch import (
    chip_of,
    close,
    padded,
    rows_plan,
    sequence_backward_config,
    sequence_config,
    trusted,
)
from fusion_model.kernels.triton_rows import Rows, steps_backward, steps_forward
from fusion_model.kernels.triton_sequence import sequence_forward
from fusion_model.kernels.triton_sequence_backward import sequence_backward
from torch import Tensor

State = tuple[Tensor, Tensor]


class Forward(NamedTuple):
    """Arguments of whatever runs a layer forward; see `lstm_rows`. h, c, … are filled."""

    x_gates: Tensor
    ids: Tensor | None
    w: Tensor
    h: Tensor
    c: Tensor
    keep: Tensor | None
    c_saved: Tensor | None
    gates: Tensor | None
    rows: Rows
    shared: bool
    units: int


class Backward(NamedTuple):
    """Arguments of whatever runs a layer backward; grad and held are filled, dc is replaced."""

    dh: Tensor
    dc: Tensor
    w: Tensor
    c_saved: Tensor
    gates: Tensor
    keep: Tensor | None
    grad: Tensor
    held: Tensor
    rows: Rows
    units: int


def pack(w: Tensor, units: int) -> Tensor:
    """Rows of w [4H, ...], gate after gate, as [HP / U blocks, 4 gates, U units], [4 HP, ...]."""
    hidden = len(w) // 4
    width = padded(hidden, units)
    w = w.unflatten(0, (4, hidden))
    w = F.pad(w, (0, 0) * (w.dim() - 2) + (0, width - hidden))
    return w.unflatten(1, (width // units, units)).transpose(0, 1).flatten(0, 2)


def _unpacked(gates: Tensor, units: int) -> tuple[Tensor, ...]:
    """Packed gates [N, 4 HP] as four [N, HP]."""
    parts = gates.unflatten(1, (-1, 4, units)).unbind(2)
    return tuple(part.flatten(1) for part in parts)


def _packed(parts: Sequence[Tensor], units: int) -> Tensor:
    return torch.stack([p.unflatten(1, (-1, units)) for p in parts], 2).flatten(1)


def _plain_forward(
    x_gates: Tensor,
    ids: Tensor | None,
    w: Tensor,
    h: Tensor,
    c: Tensor,
    keep: Tensor | None,
    c_saved: Tensor | None,
    gates: Tensor | None,
    rows: Rows,
    shared: bool,
    units: int,
) -> None:
    """As `steps_forward`, in PyTorch: the reference, and what runs if the kernel is wrong."""
    offsets, start = rows.offsets(), 0
    for t in range(rows.steps):
        n, after = rows.active(t), len(c) + offsets[t]
        if ids is not None:
            x = x_gates[ids[t]]
        elif shared:
            x = x_gates[t * rows.batch : (t + 1) * rows.batch]
        else:
            x = x_gates[offsets[t] : offsets[t + 1]]
        x = x.repeat(n // len(x), 1)
        i, f, g, o = _unpacked((x + h[start : start + n] @ w.t()).float(), units)
        parts = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c_next = parts[1] * c[:n] + parts[0] * parts[2]
        h_next = (parts[3] * torch.tanh(c_next)).to(h.dtype)
        if keep is not None:
            real = keep[t].bool().repeat(n // rows.batch)[:, None]
            c_next = torch.where(real, c_next, c[:n])
            h_next = torch.where(real, h_next, h[start : start + n])
        c[:n], h[after : after + n] = c_next, h_next
        if c_saved is not None and gates is not None:
            c_saved[after : after + n] = c_next
            gates[offsets[t] : offsets[t + 1]] = _packed(parts, units)
        start = after


def _plain_backward(
    dh: Tensor,
    dc: Tensor,
    w: Tensor,
    c_saved: Tensor,
    gates: Tensor,
    keep: Tensor | None,
    grad: Tensor,
    held: Tensor | None,
    rows: Rows,
    units: int,
) -> None:
    """As `steps_backward`, in PyTorch."""
    offsets, count = rows.offsets(), len(dc)
    following = grad[:0]
    for t in reversed(range(rows.steps)):
        n, after = rows.active(t), count + offsets[t]
        before = 0 if t == 0 else count + offsets[t - 1]
        d = dh[after : after + n].float()
        d[: len(following)] += (following @ w).float()
        i, f, g, o = _unpacked(gates[offsets[t] : offsets[t + 1]].float(), units)
        squashed = torch.tanh(c_saved[after : after + n])
        real = torch.ones(n, 1, dtype=torch.bool, device=dh.device)
        if keep is not None and held is not None:
            d += held[:n]
            real = keep[t].bool().repeat(n // rows.batch)[:, None]
            held[:n] = torch.where(real, 0.0, d)
        through = dc[:n] + d * o * (1 - squashed**2)
        parts = (
            through * g * i * (1 - i),
            through * c_saved[before : before + n] * f * (1 - f),
            through * i * (1 - g**2),
            d * squashed * o * (1 - o),
        )
        dc[:n] = torch.where(real, through * f, dc[:n])
        following = grad[offsets[t] : offsets[t + 1]]
        following[:] = _packed([torch.where(real, p, 0.0) for p in parts], units)


def _run_forward(persistent: bool, args: Forward) -> None:
    """Fill the outputs by the first kernel that fits and agrees with the reference."""
    width, batch, dtype, device = args.w.shape[1], args.rows.batch, args.h.dtype, args.h.device
    given = args.ids is not None, args.keep is not None, args.gates is not None
    key = (dtype, width, args.units, *given)
    config = sequence_config(chip_of(device), width, batch, dtype) if persistent else None
    if config is not None:

        def launch(*given: Any) -> None:
            sequence_forward(*given[:8], given[8].steps, config)

        if trusted(
            "sequence_forward", (*key, config), device, lambda: _agrees_forward(launch, args)
        ):
            return launch(*args)
    size = (args.rows.active(0) > 16, args.rows.active(0) > 64, args.shared)
    if trusted("rows_forward", key + size, device, lambda: _agrees_forward(steps_forward, args)):
        return steps_forward(*args)
    return _plain_forward(*args)


def _agrees_forward(run: Any, args: Forward) -> bool:
    """Whether `run` gives what PyTorch gives, on at most three steps of the same input."""
    rows, count = args.rows, len(args.c)
    if rows.count == 1:
        rows = Rows(rows.batch, min(rows.steps, 3), 1)
    total = rows.offsets()[-1]
    ends = {"h": count + total, "c": count, "c_saved": count + total, "gates": total}
    results = []
    for function in (run, _plain_forward):
        values = {name: getattr(args, name) for name in ends}
        fresh = {name: None if v is None else v.clone() for name, v in values.items()}
        function(*args._replace(**fresh, rows=rows))
        results.append(
            [fresh[name][:end] for name, end in ends.items() if values[name] is not None]
        )
    return all(close(a, b, args.h.dtype) for a, b in zip(*results, strict=True))


def _run_backward(persistent: bool, args: Backward) -> None:
    """As `_run_forward`."""
    width, batch, dtype, device = args.w.shape[1], args.rows.batch, args.w.dtype, args.w.device
    key = (dtype, width, args.units, args.keep is not None)
    config = sequence_backward_config(chip_of(device), width, batch, dtype) if persistent else None
    if config is not None and config.units == args.units:

        def launch(*given: Any) -> None:
            sequence_backward(*given[:8], given[8].steps, config)

        if trusted(
            "sequence_backward", (*key, config), device, lambda: _agrees_backward(launch, args)
        ):
            return launch(*args)
    size = (args.rows.active(0) > 16, args.rows.active(0) > 64)
    if trusted("rows_backward", key + size, device, lambda: _agrees_backward(steps_backward, args)):
        return steps_backward(*args)
    return _plain_backward(*args)


def _agrees_backward(run: Any, args: Backward) -> bool:
    results = []
    for function in (run, _plain_backward):
        fresh = {name: getattr(args, name).clone() for name in ("dc", "grad", "held")}
        function(*args._replace(**fresh))
        results.append(list(fresh.values()))
    return all(close(a, b, args.w.dtype) for a, b in zip(*results, strict=True))


@torch.library.custom_op("fusion_lm::lstm_rows", mutates_args=())
def lstm_rows(
    x_gates: Tensor,
    ids: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    w: Tensor,
    keep: Tensor | None,
    batch: int,
    steps: int,
    shared: bool,
    units: int,
    persistent: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of one layer.

    Args:
        x_gates: W_ih x + biases, packed: [T * B, 4 HP], shared by the rows of a sentence; or
            [M, 4 HP], a row of its own for every row and step; or, with `ids`, a table [V, 4 HP].
        ids: [T, B] int64, or None.
        h0: [N, HP].
        c0: [N, HP] float32.
        w: W_hh packed, [4 HP, HP].
        keep: [T, B] uint8, 0 holds the state; or None.
        save: keep what the backward pass needs.

    Returns:
        h [N + M, HP]: h0, then of each step the active rows; the last c of every row [N, HP]; c
        likewise [N + M, HP] and the activated gates [M, 4 HP], both empty unless `save`.
    """
    rows = Rows(batch, steps, len(h0) // batch)
    width, count, total = w.shape[1], len(h0), rows.offsets()[-1]
    h = x_gates.new_empty(count + total, width)
    h[:count] = h0
    c = c0.clone()
    c_saved = c.new_empty(count + total if save else 0, width)
    gates = x_gates.new_empty(total if save else 0, 4 * width)
    if save:
        c_saved[:count] = c
    saved = (c_saved, gates) if save else (None, None)
    _run_forward(persistent, Forward(x_gates, ids, w, h, c, keep, *saved, rows, shared, units))
    return h, c, c_saved, gates


@lstm_rows.register_fake
def _(
    x_gates: Tensor,
    ids: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    w: Tensor,
    keep: Tensor | None,
    batch: int,
    steps: int,
    shared: bool,
    units: int,
    persistent: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = h0.shape[0], w.shape[1]
    total = Rows(batch, steps, rows // batch).offsets()[-1]
    return (
        x_gates.new_empty(rows + total, width),
        torch.empty_like(c0),
        c0.new_empty(rows + total if save else 0, width),
        x_gates.new_empty(total if save else 0, 4 * width),
    )


@torch.library.custom_op("fusion_lm::lstm_rows_backward", mutates_args=())
def lstm_rows_backward(
    dh: Tensor,
    dc: Tensor,
    w: Tensor,
    keep: Tensor | None,
    h: Tensor,
    c_saved: Tensor,
    gates: Tensor,
    batch: int,
    steps: int,
    shared: bool,
    units: int,
    persistent: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_gates, h0, c0 and w, from those of h [N + M, HP] and of the last c [N, HP]."""
    count, width = dc.shape
    rows = Rows(batch, steps, count // batch)
    offsets = rows.offsets()
    grad, dc, held = torch.empty_like(gates), dc.clone(), torch.zeros_like(dc)
    _run_backward(persistent, Backward(dh, dc, w, c_saved, gates, keep, grad, held, rows, units))
    of_h0 = ((grad[:count] @ w).float() + dh[:count] + held).to(dh.dtype)
    if rows.count == 1:
        h_before, of_x = h[: offsets[-1]], grad
    else:
        starts = [0, *(count + o for o in offsets[:-2])]
        parts = [h[s : s + rows.active(t)] for t, s in enumerate(starts)]
        h_before, of_x = torch.cat(parts), grad
        if shared:
            of_x = grad.new_empty(steps * batch, 4 * width)
            for t in range(steps):
                own = grad[offsets[t] : offsets[t + 1]].view(-1, batch, 4 * width)
                of_x[t * batch : (t + 1) * batch] = own.sum(0, dtype=torch.float32)
    # An operator's outputs may not share memory; grad is of_x itself or no output.
    return of_x, of_h0, dc, grad.t() @ h_before


@lstm_rows_backward.register_fake
def _(
    dh: Tensor,
    dc: Tensor,
    w: Tensor,
    keep: Tensor | None,
    h: Tensor,
    c_saved: Tensor,
    gates: Tensor,
    batch: int,
    steps: int,
    shared: bool,
    units: int,
    persistent: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = steps * batch if shared else gates.shape[0]
    of_x = gates.new_empty(n, gates.shape[1])
    return of_x, dh.new_empty(dc.shape), torch.empty_like(dc), torch.empty_like(w)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ids, _, _, w, keep, *plan, save = inputs
    if not save or ids is not None:
        raise RuntimeError("lstm_rows has a gradient only with save=True and without ids")
    h, _, c_saved, gates = output
    ctx.save_for_backward(w, keep, h, c_saved, gates)
    ctx.mark_non_differentiable(c_saved, gates)
    ctx.plan = plan


def _gradients(ctx: Any, dh: Tensor, dc: Tensor, *_: Any) -> tuple[Any, ...]:
    w, keep, h, c_saved, gates = ctx.saved_tensors
    inputs = (dh.contiguous(), dc.contiguous(), w, keep, h, c_saved, gates, *ctx.plan)
    of_x, of_h0, of_c0, of_w = lstm_rows_backward(*inputs)
    return of_x, None, of_h0, of_c0, of_w, *[None] * 7


lstm_rows.register_autograd(_gradients, setup_context=_save)


def _layer(
    x: Tensor,
    initial: State,
    weights: Sequence[Tensor],
    keep: Tensor | None,
    rows: Rows,
    shared: bool,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h [N + M, H] and the last c [N, H] of a layer, from inputs [*, D] and initial rows [N, H].

    With `ids` [T, B], x is the table of input gates itself, packed as `gate_table` does.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    hidden = w_hh.shape[1]
    save = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, *initial, w_ih, w_hh, b_ih, b_hh)
    )
    plan = rows_plan(chip_of(x.device), hidden, rows.batch, rows.count, x.dtype, rows.steps, save)
    fill = (0, padded(hidden, plan.units) - hidden)
    if ids is None:
        x_gates = F.linear(x, pack(w_ih, plan.units), pack(b_ih + b_hh, plan.units))
    else:
        x_gates = x
    h0, c0 = (F.pad(s, fill) for s in initial)
    h, c, _, _ = lstm_rows(
        x_gates,
        ids,
        h0.to(x.dtype).contiguous(),
        c0.float().contiguous(),
        pack(F.pad(w_hh, fill), plan.units).contiguous(),
        keep,
        rows.batch,
        rows.steps,
        shared,
        plan.units,
        plan.persistent,
        save,
    )
    return h[:, :hidden], c[:, :hidden].to(x.dtype)


def _steps_first(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Inputs [B, T, D] as [T * B, D], and the mask as [T, B] uint8."""
    keep = None if mask is None else mask.t().to(torch.uint8).contiguous()
    return x.transpose(0, 1).flatten(0, 1), keep


def lstm_sequence(
    x: Tensor,
    state: State,
    weights: Sequence[Sequence[Tensor]],
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, State]:
    """As `fusion_model.kernels.lstm_sequence`."""
    batch, steps, _ = x.shape
    rows = Rows(batch, steps, 1)
    below, keep = _steps_first(x, mask)
    finals = []
    for layer, layer_weights in enumerate(weights):
        if layer and dropout:
            below = F.dropout(below, dropout)
        initial = state[0][:, layer], state[1][:, layer]
        h, c = _layer(below, initial, layer_weights, keep, rows, True)
        below = h[batch:]
        finals.append((h[-batch:], c))
    out = below.unflatten(0, (steps, batch)).transpose(0, 1)
    return out, (torch.stack([h for h, _ in finals], 1), torch.stack([c for _, c in finals], 1))


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
