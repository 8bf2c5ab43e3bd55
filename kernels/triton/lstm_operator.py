"""One LSTM layer as an operator with a gradient, by whichever Triton kernel fits.

The operator runs the rows of one layer: a sequence is one row a sentence, all prefixes are R rows
a sentence. Each kernel is compared with the reference once before it is used.

Notation: as in `fusion_model.kernels.triton.layout`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from fusion_model.kernels.triton.configs import (
    chip_of,
    on,
    sequence_backward_config,
    sequence_config,
)
from fusion_model.kernels.triton.guards import trusted
from fusion_model.kernels.triton.layout import Backward, Forward, Rows
from fusion_model.kernels.triton.lstm_naive import plain_backward, plain_forward
from fusion_model.kernels.triton.lstm_sequence import sequence_forward
from fusion_model.kernels.triton.lstm_sequence_backward import sequence_backward
from fusion_model.kernels.triton.lstm_step import steps_backward, steps_forward
from torch import Tensor

TRIAL = 1 << 20  # looks: about a second


def _run(persistent: bool, args: Forward | Backward) -> None:
    """Fill the outputs by the first kernel that fits and agrees with the equations."""
    ways: Any = sequence_backward_config, sequence_backward, steps_backward, plain_backward
    name = "backward"
    if isinstance(args, Forward):
        ways = sequence_config, sequence_forward, steps_forward, plain_forward
        name = "forward"
    config_of, sequence, steps, plain = ways
    rows, width, dtype, device = args.rows, args.w.shape[1], args.w.dtype, args.w.device

    def right(kernel: str, run: Any, *more: Any) -> bool:
        key = (width, args.units, *(value is None for value in args), *more)
        return trusted(kernel, dtype, key, device, lambda: _trial(run, plain, args))

    with on(device):
        config = None
        if persistent:
            config = config_of(chip_of(device), width, rows.batch, dtype, args.units)
        if config is not None:
            trial = partial(sequence, config=config, looks=TRIAL)  # ends, and is wrong, if it hangs
            if right(f"sequence_{name}", trial, config):
                return sequence(args, config)
        shared = isinstance(args, Forward) and args.shared
        if right(f"rows_{name}", steps, rows.active(0) > 16, rows.active(0) > 64, shared):
            return steps(args)
        plain(args)


def _trial(run: Any, plain: Any, args: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What `run` writes, and what the equations do, on copies."""
    got, expected = args.trial(), args.trial()
    run(got)
    plain(expected)
    for name in args.written:
        if getattr(args, name) is not None:
            yield getattr(got, name), getattr(expected, name)


class Plan(NamedTuple):
    """How a layer runs, as the list of integers that an operator can take."""

    batch: int
    steps: int
    units: int
    shared: int  # the rows of a sentence have the same input gates
    persistent: int  # all steps are one launch, where it fits
    save: int  # keep what the backward pass needs


@torch.library.custom_op("fusion_lm::lstm_rows", mutates_args=())
def lstm_rows(
    x_gates: Tensor,
    ids: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    w: Tensor,
    keep: Tensor | None,
    plan: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of one layer; inputs as in `Forward`, h0 [N, HP], c0 [N, HP] float32.

    Returns:
        h [N + M, HP]: h0, then of each step the active rows; the last c of every row [N, HP]; c
        likewise [N + M, HP] and the activated gates [M, 4 HP], both empty unless `save`.
    """
    batch, steps, units, shared, persistent, save = plan
    rows = Rows(batch, steps, len(h0) // batch)
    width, count, total = w.shape[1], len(h0), rows.offsets()[-1]
    h = x_gates.new_empty(count + total, width)
    h[:count] = h0
    c = c0.clone()
    c_saved = c.new_empty(count + total if save else 0, width)
    gates = x_gates.new_empty(total if save else 0, 4 * width)
    if save:
        c_saved[:count] = c
    args = Forward(x_gates, ids, w, h, c, keep, c_saved, gates, rows, bool(shared), units)
    _run(bool(persistent), args if save else args._replace(c_saved=None, gates=None))
    return h, c, c_saved, gates


@lstm_rows.register_fake
def _(
    x_gates: Tensor, ids: Any, h0: Tensor, c0: Tensor, w: Tensor, keep: Any, plan: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, steps, *_, save = plan
    rows, width = h0.shape
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
    plan: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_gates, h0, c0 and w, from those of h [N + M, HP] and of the last c [N, HP]."""
    batch, steps, units, shared, persistent, _ = plan
    count, width = dc.shape
    rows = Rows(batch, steps, count // batch)
    offsets = rows.offsets()
    grad, dc, held = torch.empty_like(gates), dc.clone(), torch.zeros_like(dc)
    args = Backward(dh, dc, w, c_saved, gates, keep, grad, held, rows, units)
    _run(bool(persistent), args)
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
def _(dh: Tensor, dc: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, gates, (batch, steps, _, shared, _, _) = rest
    of_x = gates.new_empty(steps * batch if shared else gates.shape[0], gates.shape[1])
    return of_x, dh.new_empty(dc.shape), torch.empty_like(dc), torch.empty_like(w)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ids, _, _, w, keep, plan = inputs
    if not Plan(*plan).save or ids is not None:
        raise RuntimeError("lstm_rows has a gradient only with save=True and without ids")
    h, _, c_saved, gates = output
    ctx.save_for_backward(w, keep, h, c_saved, gates)
    ctx.mark_non_differentiable(c_saved, gates)
    ctx.plan = plan


def _gradients(ctx: Any, dh: Tensor, dc: Tensor, *_: Any) -> tuple[Any, ...]:
    w, keep, h, c_saved, gates = ctx.saved_tensors
    inputs = (dh.contiguous(), dc.contiguous(), w, keep, h, c_saved, gates, ctx.plan)
    of_x, of_h0, of_c0, of_w = lstm_rows_backward(*inputs)
    return of_x, None, of_h0, of_c0, of_w, None, None


lstm_rows.register_autograd(_gradients, setup_context=_save)
