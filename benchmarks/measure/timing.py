"""Times of a call: many of them, first call apart, backends of a group taking turns.

On a CPU by the monotonic clock. On a GPU by events around each call, with the L2 cache flushed
between calls.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

Run = Callable[[], Any]
TURN = 0.1  # seconds of one backend before the next has its turn
# Threads of one library go on spinning for work after its call, and take cores from the next.
REST = 0.03  # seconds between turns
SLOW = 4
MOST = 2000  # samples


@dataclass
class Timing:
    """Seconds of each call.

    Attributes:
        seconds: of each sample, on the device.
        first: of the first call here: cold caches.
    """

    seconds: list[float] = field(default_factory=list)
    first: float = 0.0

    def percentile(self, q: float) -> float:
        """In seconds."""
        return float(np.percentile(self.seconds, q))


class Clock:
    """Times single calls on a device."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self._flush = None
        if self.cuda:
            properties = torch.cuda.get_device_properties(device)
            size = max(2 * properties.L2_cache_size, 1 << 26)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def first(self, run: Run) -> float:
        """Seconds of a call from an idle device to an idle device."""
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def sample(self, run: Run) -> float:
        """Seconds on the device."""
        if self._flush is None:
            return self.first(run)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.fill_(1)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure_in_turns(
    runs: dict[str, Run], device: str, budget: float, least: int = 5
) -> dict[str, Timing]:
    """Time several calls for `budget` seconds each, so that what else the machine does hits all.

    Args:
        least: fewest samples of each; three of a call that takes `SLOW` budgets.
    """
    clock = Clock(device)
    timings = {name: Timing(first=clock.first(run)) for name, run in runs.items()}
    for name, run in runs.items():  # warm: the second call of a long one would only cost time
        if timings[name].first < budget:
            clock.first(run)
    spent = dict.fromkeys(runs, 0.0)
    waiting = list(runs)
    while waiting:
        for name in list(waiting):
            timing, turn = timings[name], 0.0
            if len(runs) > 1 and budget:
                time.sleep(REST)
                if timing.first < TURN:
                    clock.first(runs[name])  # caches and clocks as they are in a loop
            while turn < TURN:
                timing.seconds.append(clock.sample(runs[name]))
                turn += max(timing.seconds[-1], 1e-7)
            spent[name] += turn
            slow = timing.seconds[0] > SLOW * budget and len(timing.seconds) >= 3
            enough = spent[name] >= budget and (slow or len(timing.seconds) >= least)
            if enough or len(timing.seconds) >= MOST:
                waiting.remove(name)
    return timings


def microseconds(run: Run) -> float:
    """Median time of one call on a GPU among many, back to back, so that caches stay warm."""
    timer = Timer("run()", globals={"run": run})
    timer.blocked_autorange(min_run_time=0.2)  # compiled, and clocks as they are under load
    return float(1e6 * timer.blocked_autorange(min_run_time=0.1).median)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Kineto writes to the file descriptor itself."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_memory(run: Run, device: str) -> int:
    """Most bytes that PyTorch held during a call, beyond what it held before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with _silent_stderr(), profiler:
        run()
    held = most = 0
    inner: Any = profiler.profiler  # its memory events have no public reader
    for event in inner.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
