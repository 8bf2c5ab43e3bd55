"""The ways to fuse a prefix embedding e with the LSTM (arXiv 2208.02402, section 3).

Early fusion starts the LSTM from e, late fusion lets e meet its output h; `input` fusion, a wider
input, needs nothing here. Where E is not the width that a fusion needs, e is projected, E -> H.

Shapes: ... stands for any leading ones, H hidden width, E prefix-embedding width, D features,
L layers.
"""

from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_model.config import FusionLMConfig
from fusion_model.names import EARLY, LATE

T = TypeVar("T")


class Fusing(Protocol):
    """A model, as far as fusion reads it."""

    config: FusionLMConfig
    prefix_scale: Tensor | None  # factors of e, [E]
    prefix_projection: nn.Module  # E -> H, or the identity
    gate: nn.Linear  # 2 H -> H, where fusion is `gate`
    projection: nn.Linear  # H, or for `concat` H + E -> D


def initial_state(fusion: str, e: T, zeros: T) -> tuple[T, T]:
    """Early fusion's (h, c): which of the two e [..., H] is."""
    return {"init_hidden": (e, zeros), "init_cell": (zeros, e), "init_both": (e, e)}[fusion]


def scaled(e: Tensor, scale: Tensor | None) -> Tensor:
    """e [..., E] times its factors [E], where a model has some: `training.data.prefix_scale`."""
    return e if scale is None else e * scale.to(e.dtype)


def _projected(model: Fusing, e: Tensor) -> Tensor:
    return model.prefix_projection(scaled(e, model.prefix_scale))


def start(model: Fusing, e: Tensor) -> tuple[Tensor, Tensor]:
    """(h, c) of early fusion, each [..., H], from e [..., E]."""
    e = _projected(model, e)
    return initial_state(model.config.fusion, e, torch.zeros_like(e))


def first_state(model: Fusing, e: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """(h, c) before a sequence, each [B, L, H]: from e [B, E] for early fusion, else zeros."""
    layers, hidden = model.config.num_layers, model.config.hidden_size
    if model.config.fusion in EARLY and e is not None:
        return start(model, e[:, None].expand(-1, layers, -1))
    zeros = model.projection.weight.new_zeros(batch, layers, hidden)
    return zeros, zeros


def fuse(model: Fusing, hidden: Tensor, e: Tensor | None) -> Tensor:
    """What `projection` reads, from hidden [B, T, H] and e [B, T, E], or [B, E] for all steps."""
    fusion = model.config.fusion
    if fusion not in LATE:
        return hidden
    assert e is not None
    e = e if e.dim() == 3 else e[:, None].expand(-1, hidden.shape[1], -1)
    e = _projected(model, e)
    if fusion == "concat":
        return torch.cat([hidden, e.to(hidden.dtype)], dim=-1)
    if fusion == "add":
        return hidden + e
    if fusion == "multiply":
        return hidden * e
    share = torch.sigmoid(model.gate(torch.cat([hidden, e.to(hidden.dtype)], dim=-1)))
    return share * hidden + (1 - share) * e


def without_hidden(model: Fusing, e: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The part of late fusion and projection without h, from e [B, E]: the same for all tokens.

    Returns (addend [B, D] or [D], f [B, H] or None, gate_addend [B, H] or None). With the columns
    W and G of projection and gate that read h, features are W (h * f) + addend for `multiply`,
    W (s h + (1 - s) f) + addend with s = sigmoid(G h + gate_addend) for `gate`, else W h + addend.
    """
    fusion, hidden, projection = model.config.fusion, model.config.hidden_size, model.projection
    if fusion not in LATE or e is None:
        return projection.bias, None, None
    e = _projected(model, e)
    if fusion == "concat":
        return F.linear(e, projection.weight[:, hidden:], projection.bias), None, None
    if fusion == "add":
        return projection(e), None, None
    if fusion == "multiply":
        return projection.bias, e, None
    addend = F.linear(e, model.gate.weight[:, hidden:], model.gate.bias)
    return projection.bias, e, addend
