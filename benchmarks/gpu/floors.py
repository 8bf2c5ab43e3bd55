"""What the chip at hand can do at best: memory, products, barriers, launches in a graph."""

from functools import partial

import torch
from fusion_model.benchmarks.gpu import timing
from fusion_model.kernels.check.cases import Named, Result
from fusion_model.kernels.triton import guards

SIZES = (8 << 20, 16 << 20, 32 << 20, 1 << 30)  # bytes: in the L2 cache of an H200, and not
PROGRAMS = (24, 48, 96, 128)


def _read(size: int, total: int) -> Result:
    from fusion_model.kernels.check.spin_kernels import read_all

    block, rounds = 4096, max(1, total // size)
    programs = min(8 * 132, size // 4 // block)
    x = torch.zeros(size // 4, dtype=torch.int32, device=timing.DEVICE)
    out = x.new_empty(programs)
    us = timing.microseconds(
        lambda: read_all[(programs,)](x, out, size // 4 // block, rounds, BLOCK=block, num_warps=8)
    )
    rate = size * rounds / us / 1e3
    return {"ok": True, "us": us, "gb_per_s": rate, "floor": ["read", size, rate]}


def _product(dtype: torch.dtype, order: int) -> Result:
    m = torch.randn(order, order, device=timing.DEVICE, dtype=dtype)
    us = timing.microseconds(lambda: m @ m)
    rate = 2 * order**3 / us / 1e6
    name = timing.NAMES[dtype]
    return {"ok": True, "us": us, "tflops": rate, "floor": ["product", name, rate]}


def _barrier(programs: int, steps: int) -> Result:
    from fusion_model.kernels.check.spin_kernels import empty_steps

    count = torch.zeros(1, dtype=torch.int32, device=timing.DEVICE)

    def loop() -> None:
        count.zero_()
        guards.launch_spinning(
            empty_steps, (programs, 1), (count, steps, 1 << 30), count.device, num_warps=4
        )

    try:
        us = timing.microseconds(loop) / steps
    except guards.LaunchRefused as refused:  # a smaller chip: no failure of ours
        return {"ok": True, "refused": str(refused)}
    return {"ok": True, "us": us, "floor": ["barrier", programs, us]}


def _node(nodes: int) -> Result:
    from fusion_model.kernels.check.spin_kernels import nothing

    out = torch.zeros(1, device=timing.DEVICE)

    def launches() -> None:
        for _ in range(nodes):
            nothing[(96,)](out, num_warps=4)

    us = timing.microseconds(timing.graphed(launches)) / nodes
    return {"ok": True, "us": us, "floor": ["node", nodes, us]}


def floors(
    _: torch.device, total: int = 1 << 28, order: int = 8192, steps: int = 1000, nodes: int = 200
) -> list[Named]:
    """Memory, products, grids that only wait for themselves, and launches of nothing."""
    return [
        *((f"read {size >> 20} MiB", partial(_read, size, total)) for size in SIZES),
        *((f"product {n} {order}^3", partial(_product, t, order)) for t, n in timing.NAMES.items()),
        *((f"barrier of {n} programs", partial(_barrier, n, steps)) for n in PROGRAMS),
        ("node of a graph", partial(_node, nodes)),
    ]
