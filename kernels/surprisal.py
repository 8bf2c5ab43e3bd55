"""Log-probability of each target under a vocabulary projection, without the [N, V] logits.

The logits exist for `CHUNK` positions at a time, in the forward and again in the backward pass,
which computes them anew: that costs one more matrix product and saves every pass over [N, V]
numbers in memory, of which softmax and its gradient make six.

Notation: N positions, D features, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # 8 MB of logits at V = 8192 in fp32: they stay in a CPU's cache


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        # x [N, D], weight [V, D], bias [V], targets [N] -> [N]
        wide = _accumulation_dtype(x)
        out = torch.empty(len(x), dtype=wide, device=x.device)
        normalisers = torch.empty_like(out)
        for rows in _chunks(len(x)):
            logits = F.linear(x[rows], weight, bias).to(wide)
            normalisers[rows] = torch.logsumexp(logits, dim=-1)
            out[rows] = logits.gather(1, targets[rows, None])[:, 0] - normalisers[rows]
        ctx.save_for_backward(x, weight, bias, targets, normalisers)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, normalisers = ctx.saved_tensors
        wide = normalisers.dtype
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device)
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=x.device)
        for rows in _chunks(len(x)):
            # d log p(y) / d logits = one_hot(y) - softmax(logits)
            logits = F.linear(x[rows], weight, bias).to(wide)
            upstream = grads[0][rows, None]
            grad = logits.sub_(normalisers[rows, None]).exp_().mul_(-upstream)
            grad.scatter_add_(1, targets[rows, None], upstream)
            grad_bias += grad.sum(0)
            narrow = grad.to(x.dtype)
            grad_x[rows] = narrow @ weight
            grad_weight += narrow.t() @ x[rows]
        return (
            grad_x,
            grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None,
        )


def target_log_probs(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log p(targets) in nats, float32 (float64 for float64 input), [N].

    Products run in the dtype of autocast, where that is on, sums in float32.

    Args:
        x: features, [N, D].
        weight: the projection, [V, D].
        bias: its bias, [V], or None.
        targets: token ids, [N].
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        out: Tensor = _TargetLogProbs.apply(x, weight, bias, targets)
    return out


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(n: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, n, CHUNK)]
