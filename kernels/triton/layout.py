"""LSTM rows in the layout of the Triton kernels, in plain PyTorch: their reference and fallback.

Weights and input gates are packed, so that what a program of U units needs lies together. Packing
is differentiable.

Notation: B sentences, R rows a sentence, N = B * R, T steps, N_t rows active at step t,
M = sum of N_t, H hidden width, HP = H padded, U units a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fusion_model.kernels.triton.configs import padded
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which rows run when: row r of R ends at step T - R + r."""

    batch: int
    steps: int
    count: int  # R

    def active(self, t: int) -> int:
        """N_t."""
        return self.batch * (self.count - max(0, t - (self.steps - self.count)))

    def offsets(self) -> list[int]:
        """Rows before step t, for t = 0..T; the last is M."""
        found = [0]
        for t in range(self.steps):
            found.append(found[-1] + self.active(t))
        return found


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


def unpack(gates: Tensor, units: int) -> tuple[Tensor, ...]:
    """Packed gates [N, 4 HP] as four [N, HP]."""
    parts = gates.unflatten(1, (-1, 4, units)).unbind(2)
    return tuple(part.flatten(1) for part in parts)


def pack_parts(parts: Sequence[Tensor], units: int) -> Tensor:
    return torch.stack([p.unflatten(1, (-1, units)) for p in parts], 2).flatten(1)


def plain_forward(
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
        i, f, g, o = unpack((x + h[start : start + n] @ w.t()).float(), units)
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
            gates[offsets[t] : offsets[t + 1]] = pack_parts(parts, units)
        start = after


def plain_backward(
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
        i, f, g, o = unpack(gates[offsets[t] : offsets[t + 1]].float(), units)
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
        following[:] = pack_parts([torch.where(real, p, 0.0) for p in parts], units)
