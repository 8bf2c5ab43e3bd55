"""How fast a machine can be at best: measured, not taken from a data sheet.

The fastest product of matrices in each dtype, and the fastest reading of a buffer, for buffers
from cache-sized to far beyond it.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fusion_model.benchmarks.measure.counts import Counts
from fusion_model.benchmarks.measure.timing import Clock

from fusion_model.devices import resolve_dtype


@dataclass(frozen=True)
class Ceilings:
    """Measured here and now.

    Attributes:
        flops: per second, by dtype.
        bandwidth: (bytes of the buffer, bytes read per second), smallest buffer first.
    """

    flops: dict[str, float]
    bandwidth: list[tuple[int, float]]

    def floor(self, counts: Counts, dtype: str) -> tuple[float, str]:
        """Fewest seconds that this work can take, and what sets them."""
        # Of the largest buffer that is no larger: else a floor would be too high between sizes.
        rates = [rate for size, rate in self.bandwidth if size <= counts.reach]
        memory = counts.bytes / (rates or [self.bandwidth[0][1]])[-1]
        compute = counts.flops / self.flops[dtype]
        return (memory, "memory") if memory >= compute else (compute, "compute")


def has_bfloat16(device: str) -> bool:
    """Whether it multiplies bfloat16 in hardware; without, a product takes a hundred times as
    long as in float32."""
    return resolve_dtype("auto", device) == torch.bfloat16


# Products that models do, [N, K] times [K, M]: square ones, an encoder's layer, one step's gates.
SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (2048, 384, 1536))
ON_GPU = ((4096, 4096, 4096), (8192, 8192, 8192))


def measure_ceilings(device: str, dtypes: Sequence[str], seconds: float = 0.3) -> Ceilings:
    """Time the simplest work of each dtype: products of matrices, and a vector times a matrix.

    int8 is at least as fast as bfloat16: a library that has no fast product is no ceiling. Without
    hardware for bfloat16 its products are slow, too (70 times float32), and float32's count.
    """
    clock = Clock(device)
    fast = has_bfloat16(device)
    flops, wide = dict.fromkeys(dtypes, 0.0), "bfloat16" if fast else "float32"
    measured = {wide if d == "int8" else d for d in dtypes} | (set(dtypes) if fast else set())
    for dtype, (n, k, m) in itertools.product(sorted(measured), ON_GPU if clock.cuda else SHAPES):
        best = _best(clock, _product(dtype, n, k, m, device), seconds)
        flops[dtype] = max(flops.get(dtype, 0.0), 2.0 * n * k * m / best)
    if "int8" in flops:
        flops["int8"] = max(flops["int8"], flops[wide])
    bandwidth = []
    sizes = (28,) if clock.cuda else range(18, 29)  # on a GPU the cache is flushed
    for exponent in sizes:
        rows = 2**exponent // 4 // 1024
        matrix = torch.randn(rows, 1024, device=device)
        vector, out = torch.randn(1024, device=device), torch.empty(rows, device=device)
        best = _best(clock, partial(torch.mv, matrix, vector, out=out), seconds / 3)
        bandwidth.append((2**exponent, matrix.nbytes / best))
    # What a large buffer reaches, a small one does: only the cost of the call hides it.
    for i in reversed(range(len(bandwidth) - 1)):
        bandwidth[i] = (bandwidth[i][0], max(bandwidth[i][1], bandwidth[i + 1][1]))
    return Ceilings(flops, bandwidth)


def _product(dtype: str, n: int, k: int, m: int, device: str) -> Callable[[], Any]:
    if dtype == "int8":
        a, b = (torch.randint(-9, 9, s, device=device, dtype=torch.int8) for s in ((n, k), (k, m)))
        return partial(torch._int_mm, a, b)
    a, b = (torch.randn(s, device=device).to(getattr(torch, dtype)) for s in ((n, k), (k, m)))
    return partial(torch.mm, a, b, out=torch.empty(n, m, device=device, dtype=a.dtype))


def _best(clock: Clock, run: Callable[[], Any], seconds: float) -> float:
    clock.first(run)
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        best = min(best, clock.sample(run))
    return best
