"""The goals of the project on a GPU, and what a run makes of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from fusion_model.kernels.backend import choose, measured_as
from fusion_model.kernels.check.cases import TYPES, Result


@dataclass(frozen=True)
class Goal:
    """One goal: `figure` of all `rows` that are tagged so, at least or at most `bound`.

    Of a row of several steps `us` is what one of them takes.
    """

    what: str
    tag: str
    figure: str
    bound: float
    rows: int
    at_least: bool = True


GOALS = [  # of a full run: rows are fp16 and bf16, eager and graphs
    Goal("a token at B = 1 under a graph: times cuDNN's speed", "token 1 graph", "ratio", 3.0, 2),
    Goal("a token at B = 1 under a graph: µs", "token 1 graph", "us", 15.0, 2, False),
    Goal("sequences at B = 1, 16, 64: times cuDNN's speed", "sequence", "ratio", 2.0, 12),
    Goal("sequences at B = 256: times cuDNN's speed", "sequence 256", "ratio", 1.3, 4),
    Goal("training steps: times cuDNN's speed", "training", "ratio", 1.3, 16),
    Goal("prefixes at once: times cuDNN's speed on packed rows", "prefixes", "ratio", 2.0, 4),
    Goal("whole models: times the speed with cuDNN", "model", "ratio", 1.0, 4),
]


def verdicts(results: Mapping[str, list[Result]]) -> list[dict[str, Any]]:
    """For each goal the worst figure of its rows, and met, not met, or not measured."""
    rows = [row for part in results.values() for row in part]
    return [_judged(goal, [r for r in rows if goal.tag in r.get("tags", ())]) for goal in GOALS]


def _judged(goal: Goal, rows: list[Result]) -> dict[str, Any]:
    values = [
        row[goal.figure] / (row.get("steps", 1) if goal.figure == "us" else 1)
        for row in rows
        if goal.figure in row and row.get("ok", True)
    ]
    worst = (min if goal.at_least else max)(values, default=None)
    verdict = "not measured"
    if worst is not None:
        met = worst >= goal.bound if goal.at_least else worst <= goal.bound
        complete = len(values) >= goal.rows
        verdict = "not met" if not met else "met" if complete else "not measured"
    return asdict(goal) | {"worst": worst, "verdict": verdict, "measured": len(values)}


def of_auto(
    results: Mapping[str, list[Result]], capability: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The table that `auto` goes by, `kernels/measured.json`, and whether it takes what is faster.

    Rows that decide are named by what they are of: operation, dtype, and training. The worst of
    them counts: a kernel is taken where it is never slower.
    """
    rows: dict[str, list[Result]] = {}
    for row in chain.from_iterable(results.values()):
        if "auto" in row:
            rows.setdefault(row["auto"], []).append(row)
    table, found = {}, []
    for name, own in rows.items():
        operation, kind, *training = name.split()
        known = operation, "cuda", capability, TYPES[kind], None, True
        ours = choose(*known, training=bool(training)) == "triton"
        what = f"auto takes {'the kernels' if ours else 'cuDNN'} for {name}: times its speed"
        goal = _judged(Goal(what, name, "ratio", 1.0, len(own)), own)
        if goal["measured"] == len(own):
            table[measured_as(capability, operation, kind, bool(training))] = goal["worst"]
            right = ours == (goal["worst"] >= 1)
            goal |= {"at_least": ours, "verdict": "met" if right else "not met"}
        found.append(goal)
    return table, found
