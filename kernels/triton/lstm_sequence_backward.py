"""Backward through time of a layer in one persistent launch, W_hh transposed on the chip.

A program owns U units: it holds their rows of W_hh^T for all steps. From the last step to the
first it looks at the gradient of the gates of step t + 1 in the L2 cache until all 4 HP of them are
written, multiplies, and writes the gradient of its own units' gates of step t. The gradient of W_hh
is one product by PyTorch afterwards.

Notation: as in `fusion_model.kernels.triton.lstm_sequence`.
"""

import torch
import triton
import triton.language as tl
from fusion_model.kernels.triton.configs import SequenceConfig
from fusion_model.kernels.triton.guards import launch_spinning
from fusion_model.kernels.triton.layout import Backward
from fusion_model.kernels.triton.lstm_sequence import LOOKS, sequence_constants
from fusion_model.kernels.triton.primitives import (
    cell_backward,
    join_gates,
    load_gates,
    load_part,
    publish,
    sum_warps,
    tanh,
    to_words,
    written,
)


@triton.jit(do_not_specialize=["steps", "batch", "looks"])
def sequence_backward_kernel(
    p_wt,  # [HP, 4 HP]: W_hh transposed
    p_dh,  # [T + 1, B, HP]: gradient of h from outside
    p_dc,  # [B, HP] float32: gradient of the last c, replaced by that of the first
    p_held,  # [B, HP] float32: written, gradient of h_0 past steps that held the state
    p_gates,  # [T, B, 4 HP]
    p_c,  # [T + 1, B, HP] float32
    p_keep,  # [T, B] uint8
    p_grad,  # [T, B, 4 HP], as words, all ones: written, gradient of the gates before activation
    steps,
    batch,
    looks,  # as in the forward pass
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PHASE: tl.constexpr,
    PEEK: tl.constexpr,
    SPLIT: tl.constexpr,  # always
    HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DEPTH: tl.constexpr = CHUNK * CHUNKS
    MASKED: tl.constexpr = DEPTH * WARPS > 4 * WIDTH
    KIND: tl.constexpr = p_wt.dtype.element_ty
    PACK: tl.constexpr = 32 // KIND.primitive_bitwidth
    WORDS: tl.constexpr = CHUNK // PACK
    ROW: tl.constexpr = 4 * WIDTH // PACK
    MINE: tl.constexpr = 4 * UNITS // PACK
    i_u = tl.program_id(0)
    first = tl.program_id(1) * COLUMNS
    o_b = first + tl.arange(0, COLUMNS)
    m_b = o_b < batch
    o_b = tl.where(m_b, o_b, first).to(tl.int64)
    o_u, o_mine = i_u * UNITS + tl.arange(0, UNITS), i_u * MINE + tl.arange(0, MINE)
    o_s = tl.arange(0, WARPS)[:, None, None] * DEPTH
    o_kt = o_s + tl.arange(0, CHUNK)[None, :, None]
    o_kw = o_s // PACK + tl.arange(0, WORDS)[None, None, :]
    weights = ()
    for j in tl.static_range(CHUNKS):
        p_w = p_wt + o_u[None, None, :] * (4 * WIDTH) + o_kt + j * CHUNK
        weights = weights + (load_part(p_w, o_kt + j * CHUNK < 4 * WIDTH, MASKED),)
    o_g = o_b[None, :, None] * ROW + o_kw
    o_state = o_b[:, None] * WIDTH + o_u[None, :]
    o_gate = o_b[:, None] * (4 * WIDTH) + i_u * 4 * UNITS + tl.arange(0, UNITS)[None, :]
    o_out = o_b[:, None] * ROW + o_mine[None, :]
    store, m_out = m_b[:, None] & (o_u >= 0)[None, :], m_b[:, None] & (o_mine >= 0)[None, :]
    dc = tl.load(p_dc + o_state)
    held = tl.zeros((COLUMNS, UNITS), tl.float32)
    t = steps - 1
    while t >= 0:
        # All that does not depend on the other programs is read before the wait.
        o_t = t.to(tl.int64) * batch
        i, f, g, o = load_gates(p_gates + o_t * (4 * WIDTH) + o_gate, UNITS)
        before = tl.load(p_c + o_t * WIDTH + o_state)
        o_after = (o_t + batch) * WIDTH + o_state
        squashed = tanh(tl.load(p_c + o_after))
        dh = tl.load(p_dh + o_after).to(tl.float32) + held
        keep = m_b[:, None]
        if HAS_KEEP:
            keep = (tl.load(p_keep + o_t + o_b) != 0)[:, None]
        if t < steps - 1:
            p_next = p_grad + (o_t + batch) * ROW
            if PEEK:
                p_first = p_next + first.to(tl.int64) * ROW + o_kw
                _, looks = written(p_first, o_kw, True, looks, CHUNKS, WORDS, ROW, MASKED, KIND)
            total = tl.zeros((WARPS, COLUMNS, UNITS), tl.float32)
            for j in tl.static_range(0, CHUNKS, PHASE):
                p_j, o_j = p_next + o_g + j * WORDS, o_kw + j * WORDS
                tiles, looks = written(p_j, o_j, True, looks, PHASE, WORDS, ROW, MASKED, KIND)
                for n in tl.static_range(PHASE):
                    total = tl.dot(tiles[n], weights[j + n], total, input_precision=PRECISION)
            dh += sum_warps(total, WARPS, COLUMNS, UNITS)
        if HAS_KEEP:
            held = tl.where(keep, 0.0, dh)
        d_i, d_f, d_g, d_o, dc = cell_backward(dh, dc, i, f, g, o, squashed, before, keep, HAS_KEEP)
        words = to_words(join_gates(d_i, d_f, d_g, d_o).to(KIND))
        publish(p_grad + o_t * ROW + o_out, words, m_out)
        t -= 1
    tl.store(p_dc + o_state, dc, mask=store)
    tl.store(p_held + o_state, held, mask=store)


def sequence_backward(args: Backward, config: SequenceConfig, looks: int = LOOKS) -> None:
    """As `sequence_forward`."""
    dh, dc, w, c_saved, gates, keep, grad, held, rows, _ = args
    width, words = w.shape[1], grad.view(torch.int32)
    words.fill_(-1)
    given = (
        w.t().contiguous(), dh, dc, held, gates, c_saved, dc if keep is None else keep, words,
        rows.steps, rows.batch, looks,
    )  # fmt: skip
    launch_spinning(
        sequence_backward_kernel,
        (config.programs(width), config.groups(rows.batch)),
        given,
        dh.device,
        HAS_KEEP=keep is not None,
        **sequence_constants(config, dh.dtype, width),
    )
