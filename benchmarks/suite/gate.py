"""A gate against regressions: ratios to plain PyTorch, not times, against a committed baseline.

A ratio of two backends that took turns in one run holds on a busy machine and, roughly, on
another of the same kind; a time does not. It catches a backend that lost 30 % against plain
PyTorch, not one that slowed together with it, nor what has no baseline on this kind of machine.

    python -m fusion_model.benchmarks.suite.gate RESULTS.jsonl            # compare the last run
    python -m fusion_model.benchmarks.suite.gate RESULTS.jsonl… --write   # the new baseline

A baseline is the median over the runs that it is written from, best five on a quiet machine;
uneven times take no part.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
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


def medians(runs: Iterable[tuple[Record, Iterable[Record]]]) -> dict[str, dict[str, float]]:
    """The median ratio of each case over runs, by kind of machine; only of cases that exist."""
    known = {f"{c.group} {c.backend}" for suite in SUITES for c in cases(suite)}
    found: dict[str, dict[str, list[float]]] = {}
    for run, records in runs:
        own = found.setdefault(kind_of(run["machine"]), {})
        for name, ratio in ratios(records).items():
            if name in known:
                own.setdefault(name, []).append(ratio)
    return {
        kind: {name: round(statistics.median(several), 4) for name, several in own.items()}
        for kind, own in found.items()
    }


def compare(machine: Record, records: Iterable[Record], baseline: Record) -> list[str]:
    """A line for each backend that is wrong, or, if none is, for each ratio that fell below what is
    tolerated; none: the gate is passed.

    Raises:
        FusionLMError: the baseline has no figures of such a machine, or none of these cases.
    """
    records = list(records)
    wrong = [f"{r['group']} {r['backend']}: {r['reason']}" for r in records if r["kind"] == "wrong"]
    if wrong:
        return wrong
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


def main(
    results: list[Path],
    write: Annotated[bool, typer.Option(help="make this the baseline")] = False,
    baseline: Path = BASELINE,
) -> None:
    """See the module: exit 1 where a ratio fell or a backend is wrong, 2 where nothing can be
    compared."""
    try:
        runs = [run for path in results for run in read(path)]
        run, records = runs[-1]
        if write:
            known = load_baseline(baseline) if baseline.exists() else {}
            text = json.dumps(known | medians(runs), indent=1) + "\n"
            baseline.write_text(text, encoding="utf-8")
            return
        fallen = compare(run["machine"], records, load_baseline(baseline))
    except FusionLMError as error:
        print(f"error: {error}")
        raise typer.Exit(2) from None
    said = f"{len(fallen)} backends are wrong, or below {TOLERATED:.0%} of the baseline's ratio"
    print(*fallen, said, sep="\n")
    raise typer.Exit(1 if fallen else 0)


if __name__ == "__main__":
    typer.run(main)
