"""What a persistent launch costs at the least: steps that only wait for each other."""

import triton
import triton.language as tl
from fusion_model.kernels.triton_math import arrive, wait_for


@triton.jit(do_not_specialize=["steps"])
def empty_steps(
    p_count,  # [1] int32, zero
    steps,
    LIMIT: tl.constexpr,
):
    t = steps * 0
    while t < steps:
        wait_for(p_count, tl.num_programs(0) * t, LIMIT)
        arrive(p_count)
        t += 1


@triton.jit(do_not_specialize=["target"])
def wait_in_vain(
    p_count,  # [1] int32: nobody adds to it
    p_out,  # [1] int32: what was seen last
    target,
    LIMIT: tl.constexpr,
):
    """Ends because of LIMIT alone: the debug build's promise."""
    wait_for(p_count, target, LIMIT)
    tl.store(p_out, tl.load(p_count) + 1)
