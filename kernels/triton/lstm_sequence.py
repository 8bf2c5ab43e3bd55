"""All T steps of an LSTM layer in one persistent launch, recurrent weights on the chip throughout.

A program owns U units of a group of sequences: its 4U rows of W_hh stay in registers or in shared
memory. At each step it looks at h[t] in the L2 cache until its group has written all of it,
multiplies, applies the gates, and writes its part of h[t + 1]. T + 1 slots of h, each written once,
mean that nobody overwrites what another still reads, and that h itself tells what is written: see
`written`.

Notation: B sequences in groups of COLUMNS, T steps, U units a program, HP padded width,
S warps. Gates are packed [HP / U blocks, 4 gates, U units] along their axis of 4 HP.
"""

from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from fusion_model.kernels.triton.configs import SequenceConfig, precision
from fusion_model.kernels.triton.guards import launch_spinning
from fusion_model.kernels.triton.layout import Forward
from fusion_model.kernels.triton.primitives import (
    load_part,
    publish,
    sigmoid,
    split_gates_first,
    store_gates,
    sum_warps,
    tanh,
    to_words,
    written,
)

LOOKS = (1 << 31) - 1  # half an hour or more


@triton.jit
def input_rows(p_ids, t, steps, o_b, batch, TABLE: tl.constexpr):
    """Rows of the input gates of step t, or of the last step."""
    o_x = tl.minimum(t, steps - 1).to(tl.int64) * batch + o_b
    if TABLE:
        o_x = tl.load(p_ids + o_x)
    return o_x


@triton.jit(do_not_specialize=["steps", "batch", "looks"])
def sequence_forward_kernel(
    p_x,  # [T * B, 4 HP] input gates, or a table [V, 4 HP]
    p_ids,  # [T, B] int64: rows of the table, where TABLE
    p_w,  # [4 HP, HP]
    p_h,  # [T + 1, B, HP], as words: slot 0 is given, all others are ones
    p_c,  # [B, HP] float32, replaced by the last
    p_keep,  # [T, B] uint8: 0 holds the state
    p_c_saved,  # [T + 1, B, HP] float32, where SAVE
    p_gates,  # [T, B, 4 HP] activated gates, where SAVE
    steps,
    batch,
    looks,  # in vain, in all: then a program goes on, and is wrong
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PHASE: tl.constexpr,
    PEEK: tl.constexpr,
    SPLIT: tl.constexpr,
    TABLE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """K split over the warps: products [S, 4 U, CHUNK] x [S, CHUNK, COLUMNS] by mma.

    Unless SPLIT: [4 U, CHUNK] x [CHUNK, COLUMNS] by wgmma, all warps together. What is loaded
    before a `while` stays on the chip, seen in the compiled code: W in registers, or, as wgmma
    reads it there, in shared memory.
    """
    GATES: tl.constexpr = 4 * UNITS
    DEPTH: tl.constexpr = CHUNK * CHUNKS  # of one warp, where SPLIT
    MASKED: tl.constexpr = (DEPTH * WARPS if SPLIT else DEPTH) > WIDTH
    KIND: tl.constexpr = p_w.dtype.element_ty
    PACK: tl.constexpr = 32 // KIND.primitive_bitwidth  # elements of a word
    WORDS: tl.constexpr = CHUNK // PACK
    ROW: tl.constexpr = WIDTH // PACK
    MINE: tl.constexpr = UNITS // PACK
    i_u = tl.program_id(0)
    first = tl.program_id(1) * COLUMNS
    o_b = first + tl.arange(0, COLUMNS)
    m_b = o_b < batch
    o_b = tl.where(m_b, o_b, first).to(tl.int64)  # beyond the end: the group's first
    o_gate = i_u * GATES + tl.arange(0, GATES)
    o_u, o_mine = i_u * UNITS + tl.arange(0, UNITS), i_u * MINE + tl.arange(0, MINE)
    o_state = o_b[None, :] * WIDTH + o_u[:, None]
    o_out = o_b[:, None] * ROW + o_mine[None, :]
    store, m_out = m_b[None, :] & (o_u >= 0)[:, None], m_b[:, None] & (o_mine >= 0)[None, :]
    if SPLIT:
        o_s = tl.arange(0, WARPS)[:, None, None] * DEPTH
        o_k = o_s + tl.arange(0, CHUNK)[None, None, :]
        o_w = o_gate[None, :, None] * WIDTH + o_k
        o_kw = o_s // PACK + tl.arange(0, WORDS)[None, None, :]
        o_h = o_b[None, :, None] * ROW + o_kw
    else:
        o_k, o_kw = tl.arange(0, CHUNK)[None, :], tl.arange(0, WORDS)[None, :]
        o_w = o_gate[:, None] * WIDTH + o_k
        o_h = o_b[:, None] * ROW + o_kw
    weights = ()
    for j in tl.static_range(CHUNKS):
        m_k = o_k + j * CHUNK < WIDTH
        weights = weights + (load_part(p_w + o_w + j * CHUNK, m_k, MASKED),)
    c = tl.load(p_c + o_state)
    h = tl.load(p_h + o_out)
    t = steps * 0
    o_x = input_rows(p_ids, t, steps, o_b, batch, TABLE)
    x = tl.load(p_x + o_x[None, :] * (4 * WIDTH) + o_gate[:, None])
    o_x = input_rows(p_ids, t + 1, steps, o_b, batch, TABLE)
    while t < steps:
        # Input gates come from afar: those of the next step are under way during this one.
        z_x = x.to(tl.float32)
        x = tl.load(p_x + o_x[None, :] * (4 * WIDTH) + o_gate[:, None])
        o_x = input_rows(p_ids, t + 2, steps, o_b, batch, TABLE)
        o_t = t.to(tl.int64) * batch
        if HAS_KEEP:
            keep = tl.load(p_keep + o_t + o_b) != 0
        p_t = p_h + o_t * ROW
        if PEEK:
            p_first = p_t + first.to(tl.int64) * ROW + o_kw
            _, looks = written(p_first, o_kw, t > 0, looks, CHUNKS, WORDS, ROW, MASKED, KIND)
        z = tl.zeros((WARPS, GATES, COLUMNS) if SPLIT else (GATES, COLUMNS), tl.float32)
        for j in tl.static_range(0, CHUNKS, PHASE):
            p_j, o_j = p_t + o_h + j * WORDS, o_kw + j * WORDS
            tiles, looks = written(p_j, o_j, t > 0, looks, PHASE, WORDS, ROW, MASKED, KIND)
            for n in tl.static_range(PHASE):
                b_h = tl.permute(tiles[n], (0, 2, 1)) if SPLIT else tl.trans(tiles[n])
                z = tl.dot(weights[j + n], b_h, z, input_precision=PRECISION)
        if SPLIT:
            z = sum_warps(z, WARPS, GATES, COLUMNS)
        i, f, g, o = split_gates_first(z + z_x, UNITS, COLUMNS)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c_next = f * c + i * g
        h_next = to_words(tl.trans((o * tanh(c_next)).to(KIND)))
        if HAS_KEEP:
            c_next = tl.where(keep[None, :], c_next, c)
            h_next = tl.where(keep[:, None], h_next, h)
        c, h = c_next, h_next
        publish(p_t + batch.to(tl.int64) * ROW + o_out, h, m_out)
        if SAVE:
            tl.store(p_c_saved + (o_t + batch) * WIDTH + o_state, c, mask=store)
            p_g = p_gates + (o_t + o_b)[None, :] * (4 * WIDTH) + i_u * GATES
            store_gates(p_g + tl.arange(0, UNITS)[:, None], i, f, g, o, store, UNITS)
        t += 1
    tl.store(p_c + o_state, c, mask=store)


def sequence_constants(config: SequenceConfig, dtype: Any, width: int) -> dict[str, Any]:
    """Tile and launch settings, but for what a call itself decides."""
    fields = {name.upper(): value for name, value in asdict(config).items()}
    fields |= {"PHASE": config.phase, "PEEK": config.peek}
    fields |= {"WIDTH": width, "PRECISION": precision(dtype)}
    return fields | {"num_warps": config.warps, "num_stages": 1}


def sequence_forward(args: Forward, config: SequenceConfig, looks: int = LOOKS) -> None:
    """All T steps in one launch.

    Args:
        looks: in vain, before a program no longer waits.

    Raises:
        LaunchRefused: the grid does not fit on the device as a whole.
    """
    x_gates, ids, w, h, c, keep, c_saved, gates, rows, *_ = args
    width, words = w.shape[1], h.view(torch.int32)
    words[rows.batch :] = -1  # here, so that a CUDA graph repeats it
    given = (
        x_gates, x_gates if ids is None else ids, w, words, c, c if keep is None else keep,
        c if c_saved is None else c_saved, h if gates is None else gates, rows.steps, rows.batch,
        looks,
    )  # fmt: skip
    launch_spinning(
        sequence_forward_kernel,
        (config.programs(width), config.groups(rows.batch)),
        given,
        h.device,
        TABLE=ids is not None,
        HAS_KEEP=keep is not None,
        SAVE=gates is not None,
        **sequence_constants(config, h.dtype, width),
    )
