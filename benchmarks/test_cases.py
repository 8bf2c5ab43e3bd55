"""Every case of `fusion_model.benchmarks.suite.cases`: checked against its reference, then timed.

    pytest benchmarks --benchmark-enable [--suite quick|full] [--benchmark-autosave]

Backends that this machine lacks are skipped with the reason. The last test is the gate.
"""

from typing import Any

import pytest
from fusion_model.benchmarks.measure.machine import Ceilings, describe
from fusion_model.benchmarks.measure.timing import Clock, Timing, measure_in_turns
from fusion_model.benchmarks.suite import gate
from fusion_model.benchmarks.suite.cases import Case
from fusion_model.benchmarks.suite.run import build, record, with_speedups
from fusion_model.benchmarks.suite.work import Context, Unavailable

from fusion_model.errors import FusionLMError

Records = list[dict[str, Any]]


@pytest.fixture
def tidy(case: Case, context: Context) -> None:
    """Inputs are shared within a group, and given up with the next."""
    if context.cache.get("group") != case.group:
        context.forget()
        context.cache["group"] = case.group


def test_case(
    benchmark: Any,
    tidy: None,
    case: Case,
    context: Context,
    ceilings: Ceilings,
    budget: float,
    records: Records,
) -> None:
    benchmark.group = case.group
    try:
        work = build(case, context)
    except Unavailable as reason:
        pytest.skip(str(reason))
    work.check()
    clock = Clock(context.device)
    first = clock.first(work.run)
    if benchmark.disabled:
        rounds = 1
    else:
        rounds = max(3, min(2000, int(budget / max(clock.first(work.run), 1e-6))))
    benchmark.pedantic(clock.first, (work.run,), rounds=rounds)
    if benchmark.stats is None:
        return
    timing = Timing(list(benchmark.stats.stats.data), first)
    if clock.cuda:  # by events, with the L2 cache flushed
        timing = measure_in_turns({case.backend: work.run}, context.device, budget)[case.backend]
    found = record(case, work, timing, ceilings, context.device)
    benchmark.extra_info.update({k: v for k, v in found.items() if k != "times_ms"})
    records.append(found)


def test_ratios_hold(records: Records, context: Context) -> None:
    if not records:
        pytest.skip("nothing was timed: --benchmark-enable")
    machine = describe(context.device)
    try:
        fallen = gate.compare(machine, with_speedups(records), gate.load_baseline())
    except FusionLMError as reason:
        pytest.skip(str(reason))
    assert not fallen, "\n".join(fallen)
