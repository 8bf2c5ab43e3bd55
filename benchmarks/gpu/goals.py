"""The goals of the project on a GPU, and what a run makes of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fusion_model.kernels.check.cases import Result


@dataclass(frozen=True)
class Goal:
    """One goal: `figure` of all `rows` that are tagged so, at least or at most `bound`."""

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
    found = []
    rows = [row for part in results.values() for row in part]
    for goal in GOALS:
        tagged = [row for row in rows if goal.tag in row.get("tags", ())]
        values = [row[goal.figure] for row in tagged if goal.figure in row]
        worst = (min if goal.at_least else max)(values, default=None)
        verdict = "not measured"
        if worst is not None:
            met = worst >= goal.bound if goal.at_least else worst <= goal.bound
            complete = len(values) >= goal.rows
            verdict = "not met" if not met else "met" if complete else "not measured"
        found.append(asdict(goal) | {"worst": worst, "verdict": verdict, "measured": len(values)})
    return found
