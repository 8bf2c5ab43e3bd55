"""A gate against regressions: ratios to plain PyTorch, not times, against a committed baseline.

A ratio of two backends that took turns in one run holds on a busy machine and, roughly, on
another of the same kind; a time does not.

    python -m fusion_model.benchmarks.suite.gate RESULTS.jsonl            # compare the last run
    python -m fusion_model.benchmarks.suite.gate RESULTS.jsonl… --write   # the new baseline

A baseline is the lowest ratio of the runs that it is written from; uneven times take no part.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fusion_model.benchmarks.measure.records import is_even, measured, read
from fusion_model.benchmarks.suite.cases import EAGER, SUITES, cases

from fusion_model.errors import FusionLMError

BASELINE = Path(__file__).parents[1] / "baseline.json"
TOLERATED = 0.7  # of the baseline's speed-up; a shared machine is noisy
Record = dict[str, Any]


def kind_of(machine: Record) -> str:
    """Machines whose ratios may be compared."""
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return f"{machine['name']}{threads}"


def ratios(records: Iterable[Record]) -> dict[str, float]:
    """Speed over plain PyTorch, by group and backend."""
    steady = [r for r in measured(records) if is_even(r)]
    anchors = {r["group"] for r in steady if r["backend"] == EAGER}
    return {
        f"{r['group']} {r['backend']}": r["speedup"]
        for r in steady
        if r["group"] in anchors and r["backend"] != EAGER
    }


def lowest(runs: Iterable[tuple[Record, Iterable[Record]]]) -> dict[str, dict[str, float]]:
    """The lowest ratio of each case over runs, by kind of machine; only of cases that exist."""
    known = {f"{c.group} {c.backend}" for suite in SUITES for c in cases(suite)}
    found: dict[str, dict[str, float]] = {}
    for run, records in runs:
        own = found.setdefault(kind_of(run["machine"]), {})
        for name, ratio in ratios(records).items():
            if name in known:
                own[name] = min(ratio, own.get(name, ratio))
    return found


def compare(machine: Record, records: Iterable[Record], baseline: Record) -> list[str]:
    """A line for each ratio that fell below what is tolerated; none: the gate is passed.

    Raises:
        FusionLMError: the baseline has no figures of such a machine, or none of these cases.
    """
    kind = kind_of(machine)
    if kind not in baseline:
        raise FusionLMError(f"no baseline for {kind}: there is one for {', '.join(baseline)}")
    before, now = baseline[kind], ratios(records)
    shared = [name for name in before if name in now]
    if not shared:
        raise FusionLMError("the baseline has none of the cases of this run")
    return [
        f"{name}: {now[name]:.2f} times plain PyTorch, {before[name]:.2f} in the baseline"
        for name in shared
        if now[name] < TOLERATED * before[name]
    ]


def load_baseline(path: Path = BASELINE) -> Record:
    """The committed ratios, by kind of machine."""
    loaded: Record = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m fusion_model.benchmarks.suite.gate")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true", help="make this the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    options = parser.parse_args(arguments)
    try:
        runs = [run for path in options.results for run in read(path)]
        run, records = runs[-1]
        if options.write:
            known = load_baseline(options.baseline) if options.baseline.exists() else {}
            known |= lowest(runs)
            options.baseline.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            return 0
        fallen = compare(run["machine"], records, load_baseline(options.baseline))
    except FusionLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in fallen:
        print(line)
    print(f"{len(fallen)} ratios fell below {TOLERATED:.0%} of the baseline")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
