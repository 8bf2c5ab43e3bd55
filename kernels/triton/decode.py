"""One token of every sequence on the device: cell, late fusion, projection, vocabulary, choice.

Four launches for one layer, on memory that stays, so that a CUDA graph can hold them; the token
chosen is the next step's input without the host in between. Late fusion is part of the launches
that are there anyway: what of it does not depend on h (the half of `concat` and `add` that
multiplies e) comes in as an addend, `multiply` acts where the projection reads h, and `gate`,
which needs all of h, is a launch of its own.

Notation: B sequences, H hidden width, HP padded, D features, V vocabulary, L layers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fusion_model.kernels.triton.configs import TileConfig, chained, chip_of, deep
from fusion_model.kernels.triton.decode_naive import Token
from fusion_model.kernels.triton.lstm_step import OWN, TABLE, forward_constants, rows_forward
from fusion_model.kernels.triton.primitives import chain, sigmoid
from torch import Tensor

PLAIN, MULTIPLY, GATE = 0, 1, 2
CHOICE: dict[str, Any] = {"BLOCK_V": 4096, "num_warps": 8, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["n", "outputs"])
def decode_linear(
    p_h,  # [B, STRIDE]
    p_e,  # [B, K]: multiplies h, or is mixed with it; unused where FUSION is PLAIN
    p_w,  # [O, K]
    p_addend,  # [B, O] where ROWS, else [O]
    p_out,  # [B, O]
    n,
    outputs,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    FUSION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """z = h W^T + addend, or with h * e in place of h, or s h + (1 - s) e where s = sigmoid(z)."""
    chain(CHAINED)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_n, m_o = o_n < n, o_o < outputs
    row, column = tl.where(m_n, o_n, 0).to(tl.int64), tl.where(m_o, o_o, 0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    z = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        b_h = tl.load(p_h + row[:, None] * STRIDE + o_k[None, :] + k, mask=m_k[None, :], other=0.0)
        if FUSION == 1:
            o_e = row[:, None] * K + o_k[None, :] + k
            b_e = tl.load(p_e + o_e, mask=m_k[None, :], other=0.0)
            b_h = (b_h.to(tl.float32) * b_e.to(tl.float32)).to(b_h.dtype)
        b_w = tl.load(p_w + column[None, :] * K + o_k[:, None] + k, mask=m_k[:, None], other=0.0)
        z = tl.dot(b_h, b_w, z, input_precision=PRECISION)
    if ROWS:
        z += tl.load(p_addend + row[:, None] * outputs + column[None, :]).to(tl.float32)
    else:
        z += tl.load(p_addend + column).to(tl.float32)[None, :]
    if FUSION == 2:
        share = sigmoid(z)
        h = tl.load(p_h + row[:, None] * STRIDE + column[None, :]).to(tl.float32)
        e = tl.load(p_e + row[:, None] * K + column[None, :]).to(tl.float32)
        z = share * h + (1.0 - share) * e
    o_out = row[:, None] * outputs + column[None, :]
    tl.store(p_out + o_out, z.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_o[None, :])


@triton.jit
def ordered(z):
    """Integers from 0 up, int64, in the order of the floats."""
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) - (-2147483648)


@triton.jit(do_not_specialize=["v", "batch", "steps", "k", "eos", "pad"])
def decode_choose(
    p_logits,  # [B, V] float32
    p_ids,  # [B] int64: written, the next step's input
    p_tokens,  # [steps, B] int64: written, row p_count
    p_done,  # [B] uint8: sequences that have ended; they go on with `pad`
    p_count,  # [B] int64: steps so far, replaced by one more
    p_seed,  # [1] int64
    p_temperature,  # [1] float32
    v,
    batch,
    steps,
    k,
    eos,
    pad,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Greatest logit; or a sample, by Gumbel noise, among all tokens or the k greatest.

    One program reads a sequence's logits, block after block: any vocabulary fits its registers.
    """
    chain(CHAINED)
    i_b = tl.program_id(0)
    o_v = tl.arange(0, BLOCK_V)
    p_z = p_logits + i_b.to(tl.int64) * v
    count = tl.load(p_count + i_b)
    done = tl.load(p_done + i_b) != 0
    bound = count * 0
    if TOP_K:  # the k-th greatest, bit by bit
        bit = (bound + 1) << 31
        while bit > 0:
            found = tl.zeros((BLOCK_V,), tl.int32)
            first = v * 0
            while first < v:
                z = tl.load(p_z + first + o_v, mask=first + o_v < v, other=-float("inf"))
                found += (ordered(z) >= bound + bit).to(tl.int32)
                first += BLOCK_V
            bound = tl.where(tl.sum(found, axis=0) >= k, bound + bit, bound)
            bit = bit >> 1
    best = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    token = o_v * 0
    first = v * 0
    while first < v:
        m_v = first + o_v < v
        z = tl.load(p_z + first + o_v, mask=m_v, other=-float("inf"))
        if TOP_K:
            m_v = m_v & (ordered(z) >= bound)
        if not GREEDY:
            o_word = (first + o_v).to(tl.uint32)
            nothing = o_word * 0
            word, _, _, _ = tl.philox(
                tl.load(p_seed), o_word, nothing + i_b.to(tl.uint32),
                nothing + count.to(tl.uint32), nothing,
            )  # fmt: skip
            uniform = tl.minimum(tl.maximum(tl.uint_to_uniform_float(word), 1e-10), 0.99999994)
            z = z / tl.load(p_temperature) - tl.log(-tl.log(uniform))
        better = m_v & (z > best)
        best = tl.where(better, z, best)
        token = tl.where(better, first + o_v, token)
        first += BLOCK_V
    # Of those that are as good the first, as PyTorch has it.
    token = tl.min(tl.where(best == tl.max(best, axis=0), token, v), axis=0).to(tl.int64)
    token = tl.where(done, pad, token)
    tl.debug_barrier()  # every thread has read what is now overwritten
    tl.store(p_done + i_b, (done | (token == eos)).to(tl.uint8))
    tl.store(p_ids + i_b, token)
    tl.store(p_tokens + count * batch + i_b, token, mask=count < steps)
    tl.store(p_count + i_b, count + 1)


def linear_config(rows: int, outputs: int, dtype: torch.dtype) -> TileConfig:
    """Few rows: many programs share out the weights, each of which is read once."""
    exact = dtype == torch.float32
    tall = 16 if rows <= 16 else 32 if exact else 64
    columns, depth = 16 if outputs <= 2048 else 64, 32 if exact else 128
    return TileConfig(tall, columns, depth, 4, deep(tall + columns, depth, dtype))


def linear_constants(rows: int, outputs: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    config = linear_config(rows, outputs, dtype)
    return config.settings(dtype) | {"K": width, "BLOCK_O": config.columns}


def linear(
    h: Tensor, w: Tensor, addend: Tensor, out: Tensor, e: Tensor | None = None, fusion: int = PLAIN
) -> None:
    """out [B, O] = h [B, at least K] times w [O, K] transposed, plus addend [B, O] or [O]."""
    rows, (outputs, width) = len(h), w.shape
    constants = linear_constants(rows, outputs, width, w.dtype)
    grid = (
        triton.cdiv(outputs, constants["BLOCK_O"]),
        triton.cdiv(rows, constants["BLOCK_N"]),
    )
    decode_linear[grid](
        h, h if e is None else e, w, addend, out, rows, outputs,
        STRIDE=h.stride(0), FUSION=fusion, ROWS=addend.dim() == 2, **constants,
        **chained(chip_of(h.device)),
    )  # fmt: skip


def choose(logits: Tensor, args: Token) -> None:
    """The choice among logits [B, V] float32, and what follows from it."""
    batch, size = logits.shape
    decode_choose[(batch,)](
        logits, args.ids, args.tokens, args.done, args.made, args.seed, args.temperature,
        size, batch, len(args.tokens), args.top_k, args.eos, args.pad,
        GREEDY=args.greedy, TOP_K=0 < args.top_k < size, **CHOICE,
        **chained(chip_of(logits.device)),
    )  # fmt: skip


def kernel_token(args: Token) -> Tensor:
    """As `decoding.plain_token`, by the kernels."""
    _, batch, width = args.h.shape
    outputs, hidden = args.projection.shape
    constants = forward_constants(batch, args.h.dtype, width, args.units)
    grid = (triton.cdiv(batch, constants["BLOCK_N"]) * (width // args.units),)
    x, h = args.table, args.h_next
    for layer, w in enumerate(args.inner):
        if layer:
            x = h.new_empty(batch, 4 * width)
            linear(h[layer - 1], args.outer[layer - 1], args.biases[layer - 1], x)
        c = args.c[layer]
        rows_forward[grid](
            x, args.ids, args.h[layer], w, c, c, h[layer], c, x, batch, batch,
            INPUT=OWN if layer else TABLE, HAS_KEEP=False, SAVE=False, **constants,
            **chained(chip_of(h.device)),
        )  # fmt: skip
    top, e, fusion = h[-1], args.e, PLAIN
    if args.gate is not None and args.gate_addend is not None:
        top = h.new_empty(batch, hidden)
        linear(h[-1], args.gate, args.gate_addend, top, e, GATE)
        e = None
    elif e is not None:
        fusion = MULTIPLY
    features = h.new_empty(batch, outputs)
    linear(top, args.projection, args.addend, features, e, fusion)
    logits = h.new_empty(batch, len(args.vocabulary), dtype=torch.float32)
    linear(features, args.vocabulary, args.bias, logits)
    choose(logits, args)
    return logits
