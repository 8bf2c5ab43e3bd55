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
def load_part(p, m, MASKED: tl.constexpr, VOLATILE: tl.constexpr = False):
    """A tile at p; where MASKED, as not all tiles are whole, zeros where m is false.

    VOLATILE: a plain load may be moved out of a loop, or served from L1.
    """
    if MASKED:
        x = tl.load(p, mask=m, other=0.0, volatile=VOLATILE)
    else:
        x = tl.load(p, volatile=VOLATILE)
    return x


@triton.jit
def load_gates(p, UNITS: tl.constexpr):
    """Activated gates, each the shape of p, which points to the first."""
    i, f = tl.load(p).to(tl.float32), tl.load(p + UNITS).to(tl.float32)
    g, o = tl.load(p + 2 * UNITS).to(tl.float32), tl.load(p + 3 * UNITS).to(tl.float32)
    return i, f, g, o


@triton.jit
def store_gates(p, i, f, g, o, mask, UNITS: tl.constexpr):
    """Four of a block's gates, or of their gradients, where `load_gates` finds them."""
    kind = p.dtype.element_ty
    tl.store(p, i.to(kind), mask=mask)
    tl.store(p + UNITS, f.to(kind), mask=mask)
    tl.store(p + 2 * UNITS, g.to(kind), mask=mask)
    tl.store(p + 3 * UNITS, o.to(kind), mask=mask)


@triton.jit
def cell_backward(dh, dc, i, f, g, o, squashed, before, keep, HAS_KEEP: tl.constexpr):
    """Gradients of the gates before activation, and of the c before, from those of h and c.

    squashed is tanh(c), before is the c before; where keep is false the state was held.
    """
    through = dc + dh * o * (1.0 - squashed * squashed)
    d_i = through * g * i * (1.0 - i)
    d_f = through * before * f * (1.0 - f)
    d_g = through * i * (1.0 - g * g)
    d_o = dh * squashed * o * (1.0 - o)
    passed = through * f
    if HAS_KEEP:
        d_i, d_f = tl.where(keep, d_i, 0.0), tl.where(keep, d_f, 0.0)
        d_g, d_o = tl.where(keep, d_g, 0.0), tl.where(keep, d_o, 0.0)
        passed = tl.where(keep, passed, dc)
    return d_i, d_f, d_g, d_o, passed


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
def wait_for(p_count, target, looks):
    """Spin until the group has arrived `target` times; gives the looks that are left.

    One who has none left goes on: results are then wrong, but the launch ends. One load comes
    before the loop: Triton 3.6 crashes on a loop without.
    """
    seen = tl.atomic_add(p_count, 0, sem="acquire", scope="gpu")
    while (seen < target) & (looks > 0):
        seen = tl.atomic_add(p_count, 0, sem="acquire", scope="gpu")
        looks -= 1
    return looks


@triton.jit
def chain(CHAINED: tl.constexpr):
    """Wait until the launch ahead is done, and let the next one come up; see `configs.chained`.

    Before this a kernel reads and writes nothing.
    """
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
