"""LSTM rows, a launch a step: all prefixes at once, and sequences that no single launch can hold.

A step is one product of the rows that are still active with the recurrent weights; its epilogue
adds the input gates, shared by all rows of a sentence, and applies them. Rows leave at their last
token, and are in such an order that the active ones come first: nothing is copied.

Notation: B sentences, R rows a sentence, N = B * R rows in order (row R-1 of every sentence, then
row R-2, …), T steps, N_t rows active at step t, M = sum of N_t, U units a block, HP padded width.
Gates are packed [HP / U blocks, 4 gates, U units] along their axis of 4 HP.
"""

from typing import Any

import triton
import triton.language as tl
from fusion_model.kernels.triton.configs import step_config
from fusion_model.kernels.triton.layout import Backward, Forward
from fusion_model.kernels.triton.primitives import (
    cell_backward,
    chain,
    load_gates,
    load_part,
    sigmoid,
    split_gates,
    store_gates,
    tanh,
)

OWN, SHARED, TABLE = 0, 1, 2  # where a row's input gates lie: row n, row n % B, row ids[n % B]


@triton.jit(do_not_specialize=["n", "batch"])
def rows_forward(
    p_x,  # [*, 4 HP]: input gates of this step
    p_ids,  # [B] int64, or anything: rows of p_x, where INPUT is TABLE
    p_h,  # [N_t, HP]
    p_w,  # [4 HP, HP]
    p_c,  # [N, HP] float32, replaced by the next
    p_keep,  # [B] uint8: 0 holds the state
    p_h_next,  # [N_t, HP]
    p_c_next,  # [N_t, HP] float32, where SAVE
    p_gates,  # [N_t, 4 HP]: activated gates, where SAVE
    n,
    batch,
    WIDTH: tl.constexpr,
    INPUT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    chain(CHAINED)
    TILES: tl.constexpr = WIDTH // UNITS
    i_n, i_u = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    o_row = tl.where(m_n, o_n, 0).to(tl.int64)  # rows beyond the end read row 0
    o_gate = i_u * 4 * UNITS + tl.arange(0, 4 * UNITS)
    o_k = tl.arange(0, BLOCK_K)
    o_h = o_row[:, None] * WIDTH + o_k[None, :]
    o_w = o_gate[None, :] * WIDTH + o_k[:, None]
    z = tl.zeros((BLOCK_N, 4 * UNITS), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        m_k = o_k < WIDTH - k
        b_h = load_part(p_h + o_h + k, m_k[None, :], WIDTH % BLOCK_K > 0)
        b_w = load_part(p_w + o_w + k, m_k[:, None], WIDTH % BLOCK_K > 0)
        z = tl.dot(b_h, b_w, z, input_precision=PRECISION)
    o_x = o_row
    if INPUT >= 1:
        o_x = o_row % batch
    if INPUT == 2:
        o_x = tl.load(p_ids + o_x)
    z += tl.load(p_x + o_x[:, None] * (4 * WIDTH) + o_gate[None, :]).to(tl.float32)
    i, f, g, o = split_gates(z, UNITS, BLOCK_N)
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    o_u = i_u * UNITS + tl.arange(0, UNITS)
    o_state = o_row[:, None] * WIDTH + o_u[None, :]
    store = m_n[:, None] & (o_u >= 0)[None, :]
    before = tl.load(p_c + o_state, mask=store, other=0.0)  # row 0 is another program's to replace
    c = f * before + i * g
    h = (o * tanh(c)).to(p_h_next.dtype.element_ty)
    if HAS_KEEP:
        keep = (tl.load(p_keep + o_row % batch) != 0)[:, None]
        c = tl.where(keep, c, before)
        h = tl.where(keep, h, tl.load(p_h + o_state))
    tl.store(p_c + o_state, c, mask=store)
    tl.store(p_h_next + o_state, h, mask=store)
    if SAVE:
        tl.store(p_c_next + o_state, c, mask=store)
        p_g = p_gates + o_row[:, None] * (4 * WIDTH) + i_u * 4 * UNITS + tl.arange(0, UNITS)[None]
        store_gates(p_g, i, f, g, o, store, UNITS)


@triton.jit(do_not_specialize=["n", "n_next", "batch"])
def rows_backward(
    p_next,  # [N_{t+1}, HP]: gradient of the next step's gates, times W
    p_dh,  # [N_t, HP]: gradient of this step's h from outside
    p_dc,  # [N, HP] float32: gradient of c, replaced by the one before
    p_held,  # [N, HP] float32: gradient of h that went past steps which held the state
    p_gates,  # [N_t, 4 HP]
    p_c,  # [N_t, HP] float32, after the step
    p_c_before,  # [N_t, HP] float32
    p_keep,  # [B] uint8
    p_grad,  # [N_t, 4 HP]: gradient of this step's gates before activation
    n,
    n_next,
    batch,
    WIDTH: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TILES: tl.constexpr = WIDTH // UNITS
    i_n, i_u = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    o_row = tl.where(m_n, o_n, 0).to(tl.int64)
    o_u = i_u * UNITS + tl.arange(0, UNITS)
    o_state = o_row[:, None] * WIDTH + o_u[None, :]
    dh = tl.load(p_next + o_state, mask=(o_n < n_next)[:, None], other=0.0).to(tl.float32)
    store = m_n[:, None] & (o_u >= 0)[None, :]
    dh += tl.load(p_dh + o_state).to(tl.float32)
    dc = tl.load(p_dc + o_state, mask=store, other=0.0)  # as in the forward pass
    o_gate = o_row[:, None] * (4 * WIDTH) + i_u * 4 * UNITS + tl.arange(0, UNITS)[None, :]
    i, f, g, o = load_gates(p_gates + o_gate, UNITS)
    squashed = tanh(tl.load(p_c + o_state))
    before = tl.load(p_c_before + o_state)
    keep = m_n[:, None]
    if HAS_KEEP:
        dh += tl.load(p_held + o_state, mask=store, other=0.0)
        keep = (tl.load(p_keep + o_row % batch) != 0)[:, None]
        tl.store(p_held + o_state, tl.where(keep, 0.0, dh), mask=store)
    d_i, d_f, d_g, d_o, dc = cell_backward(dh, dc, i, f, g, o, squashed, before, keep, HAS_KEEP)
    tl.store(p_dc + o_state, dc, mask=store)
    store_gates(p_grad + o_gate, d_i, d_f, d_g, d_o, store, UNITS)


def forward_constants(rows: int, dtype: Any, width: int, units: int) -> dict[str, Any]:
    """Tile and launch settings of `rows_forward`, but for what a call itself decides."""
    return step_config(rows, dtype, units).settings(dtype) | {"WIDTH": width, "UNITS": units}


def backward_constants(width: int, units: int) -> dict[str, Any]:
    """As `forward_constants`, of `rows_backward`, which multiplies nothing."""
    tile = {"WIDTH": width, "UNITS": units, "BLOCK_N": 16}
    return tile | {"num_warps": 4, "enable_fp_fusion": True}


def steps_forward(args: Forward) -> None:
    """All T steps, a launch each."""
    x_gates, ids, w, h, c, keep, c_saved, gates, rows, shared, units = args
    width, count, offsets = w.shape[1], len(c), rows.offsets()
    source = TABLE if ids is not None else SHARED if shared else OWN
    start = 0  # where the rows before this step's begin in h
    for t in range(rows.steps):
        n, done = rows.active(t), offsets[t]
        constants = forward_constants(n, h.dtype, width, units)
        grid = (triton.cdiv(n, constants["BLOCK_N"]) * (width // units),)
        x = x_gates if ids is not None else x_gates[t * rows.batch if shared else done :]
        after = count + done
        rows_forward[grid](
            x, x if ids is None else ids[t], h[start:], w, c, c if keep is None else keep[t],
            h[after:], c if c_saved is None else c_saved[after:],
            h if gates is None else gates[done:], n, rows.batch,
            INPUT=source, HAS_KEEP=keep is not None, SAVE=gates is not None, CHAINED=False,
            **constants,
        )  # fmt: skip
        start = after


def steps_backward(args: Backward) -> None:
    """The steps from the last to the first, each a product by PyTorch and a launch."""
    dh, dc, w, c_saved, gates, keep, grad, held, rows, units = args
    width, count, offsets = w.shape[1], len(dc), rows.offsets()
    constants, n_next = backward_constants(width, units), 0
    for t in reversed(range(rows.steps)):
        n, done = rows.active(t), offsets[t]
        grid = (triton.cdiv(n, constants["BLOCK_N"]) * (width // units),)
        before = 0 if t == 0 else count + offsets[t - 1]
        following = grad[done + n :][:n_next] @ w if n_next else dh
        rows_backward[grid](
            following, dh[count + done :], dc, held, gates[done:],
            c_saved[count + done :], c_saved[before:], dc if keep is None else keep[t],
            grad[done:], n, n_next, rows.batch, HAS_KEEP=keep is not None, **constants,
        )  # fmt: skip
        n_next = n
