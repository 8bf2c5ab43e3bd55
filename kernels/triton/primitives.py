"""Pieces that the Triton kernels share."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """By the sigmoid: where exp overflows the quotient is 0 and the result -1, never NaN."""
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def split_gates(z, UNITS: tl.constexpr, LANES: tl.constexpr):
    """[LANES, 4 * UNITS], gate-major, into four [LANES, UNITS]: input, forget, cell, output."""
    z = tl.permute(tl.reshape(z, (LANES, 2, 2, UNITS)), (0, 3, 2, 1))
    early, late = tl.split(z)
    i, f = tl.split(early)
    g, o = tl.split(late)
    return i, f, g, o


@triton.jit
def split_gates_first(z, UNITS: tl.constexpr, LANES: tl.constexpr):
    """[4 * UNITS, LANES], gate-major, into four [UNITS, LANES]."""
    z = tl.permute(tl.reshape(z, (2, 2, UNITS, LANES)), (2, 3, 1, 0))
    early, late = tl.split(z)
    i, f = tl.split(early)
    g, o = tl.split(late)
    return i, f, g, o


@triton.jit
def sum_warps(x, WARPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Sum of [WARPS, M, N] over its first axis, which is spread over the warps.

    A tree of splits: `tl.sum` over that axis takes six times the shuffles.
    """
    x = tl.permute(x, (1, 2, 0))
    if WARPS == 8:
        a, b = tl.split(tl.reshape(x, (M, N, 4, 2)))
        x = a + b
    if WARPS >= 4:
        a, b = tl.split(tl.reshape(x, (M, N, 2, 2)))
        x = a + b
    a, b = tl.split(x)
    return a + b


@triton.jit
def arrive(p_count):
    """Tell the group that this program's stores are done.

    Triton 3.6 puts no barrier between the block's stores and thread 0's release by itself.
    """
    tl.debug_barrier()
    tl.atomic_add(p_count, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(p_count, target, LIMIT: tl.constexpr):
    """Spin until the group has arrived `target` times.

    With LIMIT > 0, a debug build, it gives up after so many looks: results are then wrong, but
    the launch ends. One load comes before the loop: Triton 3.6 crashes on a loop without.
    """
    seen = tl.atomic_add(p_count, 0, sem="acquire", scope="gpu")
    if LIMIT > 0:
        looks = 0
        while (seen < target) & (looks < LIMIT):
            seen = tl.atomic_add(p_count, 0, sem="acquire", scope="gpu")
            looks += 1
    else:
        while seen < target:
            seen = tl.atomic_add(p_count, 0, sem="acquire", scope="gpu")
