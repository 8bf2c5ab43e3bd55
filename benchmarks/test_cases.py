"""Every group of `fusion_model.benchmarks.suite.cases`: checked against its reference, then timed.

    pytest benchmarks --benchmark-enable [--suite quick|full] [--benchmark-autosave]

Backends take turns, as in `fusion-lm bench`; those that this machine lacks are told with the
reason. The last test is the gate.
"""

from typing import Any

import pytest
from fusion_model.benchmarks.measure.ceilings import Ceilings
from fusion_model.benchmarks.measure.machine import describe
from fusion_model.benchmarks.suite import gate
from fusion_model.benchmarks.suite.bench import remarks
from fusion_model.benchmarks.suite.cases import Case
from fusion_model.benchmarks.suite.run import run
from fusion_model.benchmarks.suite.work import Context

from fusion_model.errors import FusionLMError

Records = list[dict[str, Any]]


def test_group(
    benchmark: Any,
    group: list[Case],
    context: Context,
    ceilings: Ceilings,
    budget: float,
    records: Records,
) -> None:
    benchmark.group = group[0].operation
    found: Records = benchmark.pedantic(lambda: list(run(group, context, ceilings, budget)))
    print("\n".join(remarks(found)))
    assert all(r["kind"] != "wrong" for r in found)
    timed = [r for r in found if r["kind"] == "case"]
    assert timed
    if not benchmark.disabled:
        records += found
        facts = ("p50_ms", "per_second", "speedup", "of_floor")
        benchmark.extra_info.update({r["backend"]: {k: r[k] for k in facts} for r in timed})


def test_ratios_hold(records: Records, context: Context) -> None:
    if not records:
        pytest.skip("nothing was timed: --benchmark-enable")
    machine = describe(context.device)
    try:
        fallen = gate.compare(machine, records, gate.load_baseline())
    except FusionLMError as reason:
        pytest.skip(str(reason))
    assert not fallen, "\n".join(fallen)
