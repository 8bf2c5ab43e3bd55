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
def join_gates(i, f, g, o):
    """What `split_gates` undoes: four [M, U] as [M, 4 U]."""
    x = tl.join(tl.join(i, g), tl.join(f, o))
    return tl.reshape(tl.permute(x, (0, 2, 3, 1)), (i.shape[0], 4 * i.shape[1]))


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
def to_words(x):
    """[M, N] as the int32 that lie in memory: [M, N / 2] of 16-bit types, [M, N] of float32."""
    if x.dtype.primitive_bitwidth == 32:
        words = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.uint16, bitcast=True).to(tl.int32)
        low, high = tl.split(tl.reshape(bits, (x.shape[0], x.shape[1] // 2, 2)))
        words = low | (high << 16)
    return words


@triton.jit
def from_words(words, KIND: tl.constexpr):
    """What `to_words` gave, of whatever rank, as KIND again."""
    if KIND.primitive_bitwidth == 32:
        x = words.to(KIND, bitcast=True)
    else:
        x = tl.interleave(words.to(tl.int16), (words >> 16).to(tl.int16)).to(KIND, bitcast=True)
    return x


@triton.jit
def publish(p, words, mask):
    """Store words that others wait for, by `written`: all ones, the mark, become another NaN.

    The store is a strong one, as the looks at it are, and of the same size: no race. Triton has no
    name for it.
    """
    tl.inline_asm_elementwise(
        """{ .reg .pred %ours;
        setp.ne.b32 %ours, $3, 0;
        @%ours st.relaxed.gpu.global.b32 [$1], $2;
        mov.b32 $0, 0; }""",
        "=r,l,r,r",
        [p.to(tl.int64), tl.where(words == -1, -2, words), mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def look(
    p, o, PHASE: tl.constexpr, WORDS: tl.constexpr, END: tl.constexpr, MASKED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """As `written`, without waiting: the tiles, and whether the mark is in one of them."""
    tiles = ()
    largest = tl.zeros(p.shape, tl.uint32)
    for j in tl.static_range(PHASE):
        words = load_part(p + j * WORDS, o + j * WORDS < END, MASKED, True)
        largest = tl.maximum(largest, words.to(tl.uint32, bitcast=True))
        tiles = tiles + (from_words(words, KIND),)
    largest = tl.max(tl.reshape(largest, (largest.numel,), can_reorder=True), axis=0)
    return tiles, largest == 0xFFFFFFFF


@triton.jit
def written(
    p, o, wait, looks, PHASE: tl.constexpr, WORDS: tl.constexpr, END: tl.constexpr,
    MASKED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """PHASE tiles, WORDS apart, as KIND: once other programs have written all of them.

    Memory that nobody has written yet is all ones, and data is its own flag: a tile is looked at,
    past the L1 cache, until no such word is in it. Nothing else may be told that way: there is no
    fence. One who has no looks left goes on: results are then wrong, but the launch ends. One look
    comes before the loop: Triton 3.6 crashes on a loop without.

    Args:
        o: where each word is on its axis; at END and beyond it is zero.
        wait: whether at all: what was there before the launch may be anything.

    Returns:
        The tiles, and the looks that are left.
    """
    tiles, missing = look(p, o, PHASE, WORDS, END, MASKED, KIND)
    while missing & wait & (looks > 0):
        tiles, missing = look(p, o, PHASE, WORDS, END, MASKED, KIND)
        looks -= 1
    return tiles, looks


@triton.jit
def chain(CHAINED: tl.constexpr):
    """Wait until the launch ahead is done, and let the next one come up; see `configs.chained`.

    Before this a kernel reads and writes nothing.
    """
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
