"""What a result was measured on, and how fast that machine can be at best.

The ceilings are measured, not taken from a data sheet: the fastest product of matrices in each
dtype, and the fastest reading of a buffer, for buffers from cache-sized to far beyond it.
"""

import datetime
import importlib.metadata
import itertools
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fusion_model.benchmarks.measure.counts import Counts
from fusion_model.benchmarks.measure.timing import Clock

LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "triton", "numpy")
HERE = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    """The clone that this package runs from, if it runs from one."""
    root = HERE.parent
    return root if (root / ".git").exists() and (root / "fusion_model").is_dir() else None


def commit() -> str | None:
    """Of the clone, with `+` where files differ from it; None outside one."""
    root = checkout()
    if root is None:
        return None
    git = "git", "-C", str(root)
    head = _output(*git, "rev-parse", "--short=12", "HEAD")
    where = "--", ".", ":!benchmarks/results"
    return head and head + ("+" if _output(*git, "status", "--porcelain", "-uno", *where) else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """As the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: str) -> dict[str, Any]:
    """Device, clocks, versions, commit and date, for every run's first line."""
    import psutil

    frequency = psutil.cpu_freq()
    found: dict[str, Any] = {
        "device": torch.device(device).type,
        "name": cpu_name(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "cpu_mhz": round(frequency.current) if frequency else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": [round(x, 2) for x in psutil.getloadavg()],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if found["device"] == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_mhz": _gpu_clock(device),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def where(machine: dict[str, Any]) -> str:
    """Device, versions and date in one line."""
    device = machine["name"]
    if machine["device"] == "cpu":
        plural = "" if machine["threads"] == 1 else "s"
        device += f", {machine['threads']} thread{plural}"
    return f"{device}, torch {machine['versions']['torch']}, {machine['date'][:10]}"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def _gpu_clock(device: str) -> int | None:
    try:
        return int(torch.cuda.clock_rate(torch.device(device)))
    except (ImportError, RuntimeError):  # NVML's Python package is not installed
        return None


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
