"""LSTM rows as the Triton kernels keep them: which run when, packed, and what a launch is given.

Weights and input gates are packed, so that what a program of U units needs lies together. Packing
is differentiable.

Notation: B sentences, R rows a sentence, N = B * R, T steps, N_t rows active at step t,
M = sum of N_t, H hidden width, HP = H padded, U units a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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
    """What runs a layer forward, by whichever kernel; h, c, c_saved and gates are filled."""

    x_gates: Tensor  # [T * B, 4 HP] where shared, else [M, 4 HP]; with ids a table [V, 4 HP]
    ids: Tensor | None  # [T, B] int64
    w: Tensor  # [4 HP, HP]
    h: Tensor  # [N + M, HP]: the first N rows are given
    c: Tensor  # [N, HP] float32: given, replaced by the last
    keep: Tensor | None  # [T, B] uint8: 0 holds the state
    c_saved: Tensor | None  # [N + M, HP] float32: the first N rows are given
    gates: Tensor | None  # [M, 4 HP]: activated
    rows: Rows
    shared: bool  # the rows of a sentence have the same input gates
    units: int

    @property
    def written(self) -> tuple[str, ...]:
        return ("h", "c", "c_saved", "gates")

    def trial(self) -> "Forward":
        """A copy to try a kernel on: of a sequence at most three steps."""
        rows = self.rows
        if rows.count == 1:
            rows = Rows(rows.batch, min(rows.steps, 3), 1)
        total = rows.offsets()[-1]
        ends = {"h": len(self.c) + total, "c": None, "c_saved": len(self.c) + total, "gates": total}
        return copied(self._replace(rows=rows), ends)


class Backward(NamedTuple):
    """What runs a layer backward; grad and held are filled, dc is replaced."""

    dh: Tensor  # [N + M, HP]: gradient of h from outside
    dc: Tensor  # [N, HP] float32: gradient of the last c, replaced by that of the first
    w: Tensor  # [4 HP, HP]
    c_saved: Tensor  # [N + M, HP] float32
    gates: Tensor  # [M, 4 HP]
    keep: Tensor | None  # [T, B] uint8
    grad: Tensor  # [M, 4 HP]: of the gates before activation
    held: Tensor  # [N, HP] float32, zero: gradient of h that went past steps which held it
    rows: Rows
    units: int

    @property
    def written(self) -> tuple[str, ...]:
        return ("dc", "grad", "held")

    def trial(self) -> "Backward":
        """A copy to try a kernel on."""
        return copied(self, dict.fromkeys(self.written))


Args = TypeVar("Args", bound=Any)


def copied(args: Args, ends: Mapping[str, int | None]) -> Args:
    """A named tuple with copies of these tensors, cut off at so many rows."""
    kept = {name: getattr(args, name) for name in ends}
    fresh = {name: t[: ends[name]].clone() for name, t in kept.items() if t is not None}
    changed: Args = args._replace(**fresh)
    return changed


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
