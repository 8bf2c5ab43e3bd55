"""Every case of `fusion_model.benchmarks.suite.cases`: checked against its reference, then timed.

    pytest benchmarks --benchmark-enable [--suite quick|full] [--benchmark-autosave]

The backends of a group take turns, as in `fusion-lm bench`; each is a row of pytest-benchmark's
table. One that this machine lacks is skipped with the reason. The last test is the gate.
"""

from collections.abc import Callable
from typing import Any

import pytest
from fusion_model.benchmarks.measure.machine import describe
from fusion_model.benchmarks.suite import gate
from fusion_model.benchmarks.suite.cases import Case
from fusion_model.benchmarks.suite.work import Context

from fusion_model.errors import FusionLMError

Record = dict[str, Any]


class Recorded:
    """A clock that shows times that were taken before: pytest-benchmark cannot take turns."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.samples: list[float] = []

    def __call__(self) -> float:
        return self.seconds

    def play(self) -> None:
        """Go on by the next sample."""
        self.seconds += self.samples.pop()


CLOCK = Recorded()


@pytest.mark.benchmark(timer=CLOCK)
def test_case(benchmark: Any, case: Case, measured: Callable[[Case], Record]) -> None:
    found = measured(case)
    if found["kind"] == "skip":
        pytest.skip(found["reason"])
    assert found["kind"] == "case", found["reason"]
    benchmark.group = case.group
    CLOCK.samples = [ms / 1e3 for ms in found["times_ms"][::-1]]
    benchmark.pedantic(CLOCK.play, rounds=len(CLOCK.samples))
    facts = ("p50_ms", "per_second", "speedup", "of_floor")
    benchmark.extra_info.update({name: found[name] for name in facts})


def test_ratios_hold(records: list[Record], context: Context) -> None:
    if not records:
        pytest.skip("nothing was timed: --benchmark-enable")
    try:
        fallen = gate.compare(describe(context.device), records, gate.load_baseline())
    except FusionLMError as reason:
        pytest.skip(str(reason))
    assert not fallen, "\n".join(fallen)
