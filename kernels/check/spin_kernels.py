"""What a chip can do at best, and kernels that wait on purpose: for `fusion-lm gpu-check`."""

import triton
import triton.language as tl
from fusion_model.kernels.triton.primitives import arrive, wait_for


@triton.jit(do_not_specialize=["steps", "looks"])
def empty_steps(
    p_count,  # [1] int32, zero
    steps,
    looks,
):
    """A persistent launch that only waits: the cost of its barriers."""
    t = steps * 0
    while t < steps:
        looks = wait_for(p_count, tl.num_programs(0) * t, looks)
        arrive(p_count)
        t += 1


@triton.jit(do_not_specialize=["blocks", "rounds"])
def read_all(
    p_x,  # [blocks * BLOCK] int32
    p_out,  # [programs] int32
    blocks,
    rounds,
    BLOCK: tl.constexpr,
):
    """Reads everything `rounds` times, from the L2 cache where it fits in: past the L1 caches."""
    o_x = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for _ in range(rounds):
        for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
            total += tl.load(p_x + i * BLOCK + o_x, cache_modifier=".cg")
    tl.store(p_out + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def nothing(p_out):
    """A node of a graph: what a launch costs there."""
