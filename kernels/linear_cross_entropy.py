"""Log-probability of each target under a vocabulary projection, without the [N, V] logits.

The logits exist for `CHUNK` positions at a time. Where a gradient will be wanted it is taken in
the same pass, for an upstream gradient of ones: a loss is nearly always a sum or a mean, so that
the backward pass has only to scale it. Any other upstream gradient runs the pass again.

Notation: N positions, D features, V vocabulary.
"""

from typing import Any

import torch
from fusion_model.kernels.backend import compute_dtype, resolve_backend
from torch import Tensor

CHUNK = 1024  # positions a product: large enough to be efficient
SMALL = 1e-30  # sums of exponentials from here to its inverse need no shift against overflow
ROWS = 64  # positions a softmax on a CPU: 2 MB at V = 8192 in fp32, which stay in its cache

Gradients = tuple[Tensor, Tensor, Tensor]


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        # x [N, D], weight [V, D], bias [V], targets [N] -> [N]
        out, ctx.gradients = _pass(x, weight, bias, targets, x.new_ones(len(x)))
        ctx.save_for_backward(x, weight, bias, targets)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets = ctx.saved_tensors
        upstream, gradients = grads[0], ctx.gradients
        ctx.gradients = None  # they are given away: a second backward pass computes them again
        # A sum's gradient is one number, expanded; of others a GPU is asked whether all are alike.
        alike = upstream.stride() == (0,) or not bool((upstream != upstream[:1]).any())
        if gradients is None or not alike:
            gradients = _pass(x, weight, bias, targets, upstream)[1]
        else:
            for gradient in gradients:
                gradient.mul_(upstream[:1])
        of_x, of_weight, of_bias = gradients
        return of_x, of_weight.to(weight.dtype), None if bias is None else of_bias.to(x.dtype), None


def _pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, upstream: Tensor | None
) -> tuple[Tensor, Gradients | None]:
    """log p [N], and, given an upstream gradient [N], the gradients of x, weight and bias."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(len(x), dtype=wide, device=x.device)
    grad_weight: Tensor | None = None
    if upstream is not None:
        grad_x = torch.empty_like(x)
        grad_bias = torch.zeros(len(weight), dtype=wide, device=x.device)
    # The same memory for all: fresh pages would cost a third of the product. The bias is added to
    # what is in the cache: `addmm` would write it to all logits first.
    few = min(len(x), ROWS if x.device.type == "cpu" else CHUNK)
    all_logits = x.new_empty(min(len(x), CHUNK), len(weight))
    exponentials = torch.empty(few, len(weight), dtype=wide, device=x.device)
    offset = torch.zeros((), dtype=wide, device=x.device) if bias is None else bias.to(wide)
    for chunk in _parts(len(x), CHUNK):
        y = targets[chunk, None]
        logits = torch.mm(x[chunk], weight.t(), out=all_logits[: len(y)])
        of_target = logits.gather(1, y)[:, 0] + offset.expand(len(weight))[y[:, 0]]
        if upstream is None:
            out[chunk] = of_target - _log_sums(logits, offset, exponentials)
            continue
        for rows in _parts(len(y), few):
            z = exponentials[: len(y[rows])].copy_(logits[rows]).add_(offset)
            shift = z.amax(-1, keepdim=True)
            total = z.sub_(shift).exp_().sum(-1, keepdim=True)
            out[chunk][rows] = of_target[rows] - (shift + total.log())[:, 0]
            # d log p(y) / d logits = one_hot(y) - softmax(logits)
            g = upstream[chunk][rows, None].to(wide)
            z.mul_(-g / total).scatter_add_(1, y[rows], g)
            grad_bias += z.sum(0)
            logits[rows] = z
        torch.mm(logits, weight, out=grad_x[chunk])
        if grad_weight is None:  # most often the only one
            grad_weight = logits.t() @ x[chunk]
        elif x.dtype == wide:
            grad_weight.addmm_(logits.t(), x[chunk])
        else:
            grad_weight = grad_weight.to(wide).add_(logits.t() @ x[chunk])
    if upstream is None:
        return out, None
    grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
    return out, (grad_x, grad_weight, grad_bias)


def _log_sums(logits: Tensor, bias: Tensor, buffer: Tensor) -> Tensor:
    """log sum exp(logits + bias) over the vocabulary, [N], in the dtype of `buffer` [rows, V]."""
    sums = buffer.new_empty(len(logits))
    parts = [(rows, buffer[: len(sums[rows])]) for rows in _parts(len(logits), len(buffer))]
    if buffer.device.type == "cpu":  # a GPU would have to wait for the answer
        for rows, z in parts:
            torch.sum(z.copy_(logits[rows]).add_(bias).exp_(), -1, out=sums[rows])
        low, high = sums.aminmax()
        if low > SMALL and high < 1 / SMALL:
            return sums.log_()
    for rows, z in parts:
        torch.logsumexp(z.copy_(logits[rows]).add_(bias), -1, out=sums[rows])
    return sums


def target_log_probs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """log p(targets) in nats, float32 (float64 for float64 input), [N].

    Products run in the dtype of autocast, where that is on, sums in float32.

    Args:
        x: features, [N, D].
        weight: the projection, [V, D].
        bias: its bias, [V], or None.
        targets: token ids, [N].
        backend: one of `BACKENDS`; all but `triton` run in chunks by PyTorch.

    Raises:
        ValueError: the backend cannot run here.
    """
    device, dtype = x.device.type, compute_dtype(x)
    inputs = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if resolve_backend(backend, x.device, operation="surprisal", dtype=dtype) == "triton":
        from fusion_model.kernels.triton import linear_cross_entropy

        with torch.autocast(device, enabled=False):
            return linear_cross_entropy.target_log_probs(*inputs, targets)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            out: Tensor = _TargetLogProbs.apply(*inputs, targets)
            return out
        return _pass(*inputs, targets, None)[0]


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
