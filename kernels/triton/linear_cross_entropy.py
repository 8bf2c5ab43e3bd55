"""Log-probability of targets without the [N, V] logits: Triton kernels, launchers, operator.

Forward: one program a tile of positions x vocabulary; its epilogue keeps of the tile's logits
only their maximum, the sum of their exponentials and the target's logit. Backward: the same
product again, whose epilogue writes the logits' gradient, `CHUNK` positions at a time, for two
products by PyTorch. No locks and no atomics: results are the same bits every time.

Notation: N positions, D features, V vocabulary, TILES = ceil(V / BLOCK_V).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fusion_model.kernels.triton.configs import on, surprisal_config
from fusion_model.kernels.triton.guards import trusted
from fusion_model.kernels.triton.primitives import load_part
from torch import Tensor

CHUNK = 2048  # positions a gradient tile: 32 MB at V = 8192 in bf16, within an L2 of 50 MB


@triton.jit
def logits_tile(
    p_x,
    p_w,
    p_bias,
    n,
    v,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's logits [BLOCK_N, BLOCK_V] in float32, -inf beyond V, and where they are."""
    GROUP: tl.constexpr = 8  # row tiles that share the vocabulary's tiles in the L2 cache
    tiles = tl.cdiv(v, BLOCK_V)
    first = tl.program_id(0) // (GROUP * tiles) * GROUP
    size = tl.minimum(tl.cdiv(n, BLOCK_N) - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles)
    i_n, i_v = first + within % size, within // size
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_k = tl.arange(0, BLOCK_K)
    # Rows beyond the end read row 0: what they give is never stored.
    o_x = tl.where(o_n < n, o_n, 0)[:, None].to(tl.int64) * D + o_k[None, :]
    o_w = tl.where(o_v < v, o_v, 0)[None, :].to(tl.int64) * D + o_k[:, None]
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_K):
        b_x = load_part(p_x + o_x + k, (o_k < D - k)[None, :], D % BLOCK_K > 0)
        b_w = load_part(p_w + o_w + k, (o_k < D - k)[:, None], D % BLOCK_K > 0)
        z = tl.dot(b_x, b_w, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += tl.load(p_bias + o_v, mask=o_v < v, other=0.0).to(tl.float32)[None, :]
    return tl.where((o_v < v)[None, :], z, -float("inf")), o_n, o_v, i_v


@triton.jit(do_not_specialize=["n", "v"])
def surprisal_forward(
    p_x,  # [N, D]
    p_w,  # [V, D]
    p_bias,  # [V]
    p_targets,  # [N] int64
    p_max,  # [TILES, N] float32
    p_sum,  # [TILES, N] float32
    p_hit,  # [N] float32: logit of the target
    n,
    v,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    z, o_n, o_v, i_v = logits_tile(
        p_x, p_w, p_bias, n, v, D, HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION
    )
    m_n = o_n < n
    greatest = tl.max(z, axis=1)
    total = tl.sum(tl.exp(z - greatest[:, None]), axis=1)
    target = tl.load(p_targets + o_n, mask=m_n, other=-1)
    hit = tl.sum(tl.where(target[:, None] == o_v[None, :], z, 0.0), axis=1)
    o_tile = i_v.to(tl.int64) * n + o_n
    tl.store(p_max + o_tile, greatest, mask=m_n)
    tl.store(p_sum + o_tile, total, mask=m_n)
    here = (target >= i_v * BLOCK_V) & (target < (i_v + 1) * BLOCK_V)
    tl.store(p_hit + o_n, hit, mask=m_n & here)


@triton.jit(do_not_specialize=["n", "v"])
def surprisal_backward(
    p_x,  # [N, D]
    p_w,  # [V, D]
    p_bias,  # [V]
    p_targets,  # [N] int64
    p_lse,  # [N] float32: log of the sum of exponentials
    p_upstream,  # [N] float32
    p_grad,  # [N, V]: gradient of the logits
    n,
    v,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    z, o_n, o_v, _ = logits_tile(
        p_x, p_w, p_bias, n, v, D, HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION
    )
    m_n = o_n < n
    lse = tl.load(p_lse + o_n, mask=m_n, other=0.0)
    upstream = tl.load(p_upstream + o_n, mask=m_n, other=0.0)
    target = tl.load(p_targets + o_n, mask=m_n, other=-1)
    # d log p(y) / d logits = one_hot(y) - softmax(logits)
    hot = tl.where(target[:, None] == o_v[None, :], 1.0, 0.0)
    grad = (hot - tl.exp(z - lse[:, None])) * upstream[:, None]
    o_grad = o_n[:, None].to(tl.int64) * v + o_v[None, :]
    tl.store(p_grad + o_grad, grad.to(p_grad.dtype.element_ty), mask=m_n[:, None] & (o_v < v)[None])


def surprisal_constants(width: int, dtype: torch.dtype, biased: bool) -> dict[str, Any]:
    """Tile and launch settings of both kernels."""
    config = surprisal_config(dtype)
    return config.settings(dtype) | {"D": width, "HAS_BIAS": biased, "BLOCK_V": config.columns}


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    n, v = len(x), len(weight)
    options = surprisal_constants(x.shape[1], x.dtype, bias is not None)
    tiles = triton.cdiv(v, options["BLOCK_V"])
    greatest, total = x.new_empty(2, tiles, n, dtype=torch.float32)
    hit = x.new_empty(n, dtype=torch.float32)
    if n:
        grid = (triton.cdiv(n, options["BLOCK_N"]) * tiles,)
        surprisal_forward[grid](x, weight, bias, targets, greatest, total, hit, n, v, **options)
    lse = torch.logsumexp(greatest + total.log_(), 0)
    return hit - lse, lse


def _backward(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    v = len(weight)
    options = surprisal_constants(x.shape[1], x.dtype, bias is not None)
    grad_x = torch.empty_like(x)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    grad_bias = x.new_zeros(v, dtype=torch.float32)
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        of_logits = x.new_empty(len(x[part]), v)
        n = len(of_logits)
        grid = (triton.cdiv(n, options["BLOCK_N"]) * triton.cdiv(v, options["BLOCK_V"]),)
        surprisal_backward[grid](
            x[part], weight, bias, targets[part], lse[part], upstream[part], of_logits, n, v,
            **options,
        )  # fmt: skip
        torch.mm(of_logits, weight, out=grad_x[part])
        grad_weight += of_logits.t() @ x[part]
        grad_bias += of_logits.sum(0, dtype=torch.float32)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(x.dtype)


def _plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight, bias).float()
    lse = logits.logsumexp(-1)
    return logits.gather(1, targets[:, None])[:, 0] - lse, lse


def _plain_backward(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.exp(F.linear(x, weight, bias).float() - lse[:, None]) * -upstream[:, None]
    grad = grad.scatter_add_(1, targets[:, None], upstream[:, None]).to(x.dtype)
    return grad @ weight, grad.t() @ x, grad.sum(0)


def _trial(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Both kernels, and PyTorch, on 200 random positions of this width."""
    own = torch.Generator(x.device).manual_seed(0)  # the user's numbers stay as they are
    x = torch.randn(200, x.shape[1], dtype=x.dtype, device=x.device, generator=own)
    y = torch.arange(200, device=x.device) % len(weight)
    expected = _plain_forward(x, weight, bias, y)
    inputs = (x.new_ones(200, dtype=torch.float32), x, weight, bias, y, expected[1])
    yield from zip(_forward(x, weight, bias, y), expected, strict=True)
    yield from zip(_backward(*inputs), _plain_backward(*inputs), strict=True)


def _right(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    key = (x.shape[1], bias is not None)
    return trusted("surprisal", x.dtype, key, x.device, lambda: _trial(x, weight, bias))


@torch.library.custom_op("fusion_lm::surprisal_forward", mutates_args=())
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    with on(x.device):
        run = _forward if _right(x, weight, bias) else _plain_forward
        return run(x, weight, bias, targets)


@_forward_op.register_fake
def _(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    return out, torch.empty_like(out)


@torch.library.custom_op("fusion_lm::surprisal_backward", mutates_args=())
def _backward_op(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with on(x.device):
        run = _backward if _right(x, weight, bias) else _plain_backward
        return run(upstream.contiguous(), x, weight, bias, targets, lse)


@_backward_op.register_fake
def _(_: Tensor, x: Tensor, weight: Tensor, *_rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), x.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, upstream: Tensor, _of_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, targets, lse = ctx.saved_tensors
    of_x, of_weight, of_bias = _backward_op(upstream, x, weight, bias, targets, lse)
    return of_x, of_weight, None if bias is None else of_bias, None


_forward_op.register_autograd(_gradients, setup_context=_save)


def target_log_probs(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """As `fusion_model.kernels.target_log_probs`, by the kernels; all of one dtype."""
    out: Tensor = _forward_op(x.contiguous(), weight.contiguous(), bias, targets.contiguous())[0]
    return out
