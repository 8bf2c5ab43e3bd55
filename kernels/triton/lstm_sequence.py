"""All T steps of an LSTM layer in one persistent launch, recurrent weights on the chip throughout.

A program owns U units of a group of sequences: its 4U rows of W_hh stay in registers or in shared
memory. At each step it reads h[t] from the L2 cache, multiplies, applies the gates,
writes its part of h[t + 1], and waits until its group has done the same. T + 1 slots of h mean
that nobody overwrites what another still reads.

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
    arrive,
    load_part,
    sigmoid,
    split_gates_first,
    store_gates,
    sum_warps,
    tanh,
    wait_for,
)

LOOKS = (1 << 31) - 1  # half an hour or more


@triton.jit
def input_rows(p_ids, t, steps, o_b, batch, TABLE: tl.constexpr):
    """Rows of the input gates of step t, or of the last step."""
    o_x = tl.minimum(t, steps - 1).to(tl.int64) * batch + o_b
    if TABLE:
        o_x = tl.load(p_ids + o_x)
    return o_x


@triton.jit
def load_phase(
    p, o_k, PHASE: tl.constexpr, CHUNK: tl.constexpr, END: tl.constexpr, MASKED: tl.constexpr
):
    """PHASE tiles at p, CHUNK apart, past the L1 cache; zeros where o_k is at END or beyond."""
    tiles = ()
    for j in tl.static_range(PHASE):
        tiles = tiles + (load_part(p + j * CHUNK, o_k + j * CHUNK < END, MASKED, True),)
    return tiles


@triton.jit
def advance(
    z,
    c,
    h,
    t,
    p_h,
    p_keep,
    p_c_saved,
    p_gates,
    o_b,
    m_b,
    i_u,
    batch,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Gates z [4 U, COLUMNS] applied to c and h [U, COLUMNS]; stores them as of t + 1."""
    i, f, g, o = split_gates_first(z, UNITS, COLUMNS)
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c_next = f * c + i * g
    h_next = (o * tanh(c_next)).to(h.dtype)
    o_row = t.to(tl.int64) * batch + o_b
    if HAS_KEEP:
        keep = (tl.load(p_keep + o_row) != 0)[None, :]
        c_next = tl.where(keep, c_next, c)
        h_next = tl.where(keep, h_next, h)
    o_u = i_u * UNITS + tl.arange(0, UNITS)
    o_next = (o_row + batch)[None, :] * WIDTH + o_u[:, None]
    store = m_b[None, :] & (o_u >= 0)[:, None]
    tl.store(p_h + o_next, h_next, mask=store)
    if SAVE:
        tl.store(p_c_saved + o_next, c_next, mask=store)
        p_g = p_gates + o_row[None, :] * (4 * WIDTH) + i_u * 4 * UNITS
        p_g += tl.arange(0, UNITS)[:, None]
        store_gates(p_g, i, f, g, o, store, UNITS)
    return c_next, h_next


@triton.jit(do_not_specialize=["steps", "batch", "looks"])
def sequence_forward_kernel(
    p_x,  # [T * B, 4 HP] input gates, or a table [V, 4 HP]
    p_ids,  # [T, B] int64: rows of the table, where TABLE
    p_w,  # [4 HP, HP]
    p_h,  # [T + 1, B, HP]; slot 0 is given
    p_c,  # [B, HP] float32, replaced by the last
    p_keep,  # [T, B] uint8: 0 holds the state
    p_c_saved,  # [T + 1, B, HP] float32, where SAVE
    p_gates,  # [T, B, 4 HP] activated gates, where SAVE
    p_count,  # [groups] int32, zero
    steps,
    batch,
    looks,  # at counters, in all: then a program goes on, and is wrong
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PHASE: tl.constexpr,
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
    i_u = tl.program_id(0)
    o_b = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_b = o_b < batch
    o_b = tl.where(m_b, o_b, tl.program_id(1) * COLUMNS)  # beyond the end: the group's first
    o_gate = i_u * GATES + tl.arange(0, GATES)
    o_state = o_b.to(tl.int64)[None, :] * WIDTH + (i_u * UNITS + tl.arange(0, UNITS))[:, None]
    p_mine = p_count + tl.program_id(1)
    if SPLIT:
        o_k = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, CHUNK)[None, None, :]
        o_kt = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, CHUNK)[None, :, None]
        o_w = o_gate[None, :, None] * WIDTH + o_k
        o_h = o_b.to(tl.int64)[None, None, :] * WIDTH + o_kt
    else:
        o_k, o_kt = tl.arange(0, CHUNK)[None, :], tl.arange(0, CHUNK)[:, None]
        o_w = o_gate[:, None] * WIDTH + o_k
        o_h = o_b.to(tl.int64)[None, :] * WIDTH + o_kt
    weights = ()
    for j in tl.static_range(CHUNKS):
        m_k = o_k + j * CHUNK < WIDTH
        weights = weights + (load_part(p_w + o_w + j * CHUNK, m_k, MASKED),)
    c = tl.load(p_c + o_state)
    h = tl.load(p_h + o_state)
    t = steps * 0
    o_x = input_rows(p_ids, t, steps, o_b, batch, TABLE)
    x = tl.load(p_x + o_x[None, :] * (4 * WIDTH) + o_gate[:, None])
    o_x = input_rows(p_ids, t + 1, steps, o_b, batch, TABLE)
    while t < steps:
        # Input gates come from afar: those of the next step are under way during this one.
        z_x = x.to(tl.float32)
        x = tl.load(p_x + o_x[None, :] * (4 * WIDTH) + o_gate[:, None])
        o_x = input_rows(p_ids, t + 2, steps, o_b, batch, TABLE)
        looks = wait_for(p_mine, tl.num_programs(0) * t, looks)
        p_h_t = p_h + t.to(tl.int64) * batch * WIDTH + o_h
        z = tl.zeros((WARPS, GATES, COLUMNS) if SPLIT else (GATES, COLUMNS), tl.float32)
        for j in tl.static_range(0, CHUNKS, PHASE):
            tiles = load_phase(p_h_t + j * CHUNK, o_kt + j * CHUNK, PHASE, CHUNK, WIDTH, MASKED)
            for i in tl.static_range(PHASE):
                z = tl.dot(weights[j + i], tiles[i], z, input_precision=PRECISION)
        if SPLIT:
            z = sum_warps(z, WARPS, GATES, COLUMNS)
        c, h = advance(
            z + z_x, c, h, t, p_h, p_keep, p_c_saved, p_gates,
            o_b, m_b, i_u, batch, WIDTH, UNITS, COLUMNS, HAS_KEEP, SAVE,
        )  # fmt: skip
        arrive(p_mine)
        t += 1
    o_u = tl.arange(0, UNITS)
    tl.store(p_c + o_state, c, mask=m_b[None, :] & (o_u >= 0)[:, None])


def sequence_constants(config: SequenceConfig, dtype: Any, width: int) -> dict[str, Any]:
    """Tile and launch settings, but for what a call itself decides."""
    fields = {name.upper(): value for name, value in asdict(config).items()}
    fields |= {"PHASE": config.phase, "WIDTH": width, "PRECISION": precision(dtype)}
    return fields | {"num_warps": config.warps, "num_stages": 1}


def sequence_forward(args: Forward, config: SequenceConfig, looks: int = LOOKS) -> None:
    """All T steps in one launch.

    Args:
        looks: at counters, before a program no longer waits.

    Raises:
        LaunchRefused: the grid does not fit on the device as a whole.
    """
    x_gates, ids, w, h, c, keep, c_saved, gates, rows, *_ = args
    width, groups = w.shape[1], config.groups(rows.batch)
    given = (
        x_gates, x_gates if ids is None else ids, w, h, c, c if keep is None else keep,
        c if c_saved is None else c_saved, h if gates is None else gates,
        torch.zeros(groups, dtype=torch.int32, device=h.device), rows.steps, rows.batch,
        looks,
    )  # fmt: skip
    launch_spinning(
        sequence_forward_kernel,
        (config.programs(width), groups),
        given,
        h.device,
        TABLE=ids is not None,
        HAS_KEEP=keep is not None,
        SAVE=gates is not None,
        **sequence_constants(config, h.dtype, width),
    )
