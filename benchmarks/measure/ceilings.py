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


def of_size(figures: Sequence[tuple[int, float]], size: float) -> float:
    """The figure of the smallest measured size that is no smaller; else of the largest."""
    return next((x for measured, x in figures if measured >= size), figures[-1][1])


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
        memory = counts.bytes / of_size(self.bandwidth, counts.bytes)
        compute = counts.flops / self.flops[dtype]
        return (memory, "memory") if memory >= compute else (compute, "compute")


def measure_ceilings(device: str, dtypes: Sequence[str], seconds: float = 0.3) -> Ceilings:
    """Time the largest simple work: a product of matrices, and a vector times a matrix."""
    clock = Clock(device)
    edges = (4096, 8192) if clock.cuda else (512, 1024, 2048)
    flops = dict.fromkeys(dtypes, 0.0)
    for dtype, edge in itertools.product(dtypes, edges):
        a, b = (torch.randn(edge, edge, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        best = _best(clock, partial(torch.mm, a, b, out=out), seconds)
        flops[dtype] = max(flops[dtype], 2.0 * edge**3 / best)
    bandwidth = []
    sizes = (28,) if clock.cuda else (18, 20, 22, 24, 26, 28)  # on a GPU the cache is flushed
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


def _best(clock: Clock, run: Callable[[], Any], seconds: float) -> float:
    clock.first(run)
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        best = min(best, clock.sample(run)[0])
    return best
