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
