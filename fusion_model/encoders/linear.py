"""Linear layers for inference: on the CPU with weights packed once, and what follows fused in.

PyTorch's own `linear` lays out the weights anew in every call, copies the bias into the result
first, and leaves activation and sum to passes of their own. oneDNN does all of it in one, through
the operators that `torch.compile` calls; where a build of PyTorch lacks them, or refuses a type,
the plain ones do the same. For a few rows of float32, as when a text grows by a token, the plain
one reads the weights fastest.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # that the packing is best for; measured, it hardly matters
FEW = 3  # rows: one takes 0.83 ms of MiniLM's products in three layers plain, 1.15 ms packed


class Linear:
    """x [M, K] -> x W^T + b [M, N], then an activation or a sum.

    Args:
        weight: [N, K], kept or packed now.
        bias: [N].
        activation: applied to the result.
        is_gelu: the activation is the exact GELU, which can be fused.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: Callable[[Tensor], Tensor] | None = None,
        is_gelu: bool = False,
    ) -> None:
        self._weight, self._bias = weight.detach(), bias.detach()
        self._activation = activation
        self._packed = packed(self._weight)
        self._few = FEW if weight.dtype == torch.float32 else 0
        self._fused = "gelu" if is_gelu else "none"

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of x [M, K]; `residual` [M, N] is added to the result."""
        plain = self._packed is None or len(x) <= self._few
        if plain:
            out = F.linear(x, self._weight, self._bias)
        elif residual is not None and self._activation is None:
            run: Any = torch.ops.mkldnn._linear_pointwise.binary
            fused: Tensor = run(x, residual, self._packed, self._bias, "add")
            return fused
        else:
            run = torch.ops.mkldnn._linear_pointwise.default
            out = run(x, self._packed, self._bias, self._fused, [], "none")
        if self._activation is not None and (plain or self._fused == "none"):
            out = self._activation(out)
        return out if residual is None else out.add_(residual)


def packed(weight: Tensor) -> Any:
    """A weight [N, K] in oneDNN's layout; None where that cannot be had, or is not proven right."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        found = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        x = torch.ones(2, weight.shape[1], dtype=weight.dtype)
        zeros = weight.new_zeros(weight.shape[0])
        ours = torch.ops.mkldnn._linear_pointwise.default(x, found, zeros, "none", [], "none")
        theirs = torch.ops.mkldnn._linear_pointwise.binary(x, ours, found, zeros, "add")
    except (AttributeError, RuntimeError):  # NotImplementedError is one
        return None
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2**-6
    exact = weight.float().sum(dim=1)
    allowed = tolerance * weight.float().abs().sum(dim=1) + 1e-6
    for out, times in ((ours, 1), (theirs, 2)):
        if bool(((out.float() - times * exact).abs() > times * allowed).any()):
            return None
    return found
