"""What a piece of work would take at this chip's measured best, and the goals of the project.

The floor of a row of times: the longer of moving its bytes and of its products, at the rates that
were measured on this chip, and all its waits besides, one after the other. A wait is a barrier of
a persistent launch, or, where every step is a launch, a node of a CUDA graph.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusion_model.benchmarks.measure.ceilings import Ceilings, of_size
from fusion_model.benchmarks.measure.counts import Counts
from fusion_model.kernels.check.cases import Result


@dataclass(frozen=True)
class Work:
    """What must be done at the least.

    Attributes:
        moved: bytes read and written.
        flops: of products.
        dtype: of products, `bf16` or `fp16`.
        waits: one after another.
        programs: of a barrier; 0: a wait is a node of a graph.
    """

    moved: int
    flops: int
    dtype: str
    waits: int
    programs: int = 0


@dataclass(frozen=True)
class Rates:
    """What the rows of `floors` say of this chip.

    Attributes:
        ceilings: of its memory and its products.
        barriers, nodes: (how many, µs of one), of programs and of a graph's nodes.
    """

    ceilings: Ceilings
    barriers: Sequence[tuple[int, float]]
    nodes: Sequence[tuple[int, float]]

    @classmethod
    def of_rows(cls, rows: Iterable[Result]) -> "Rates":
        found = sorted(row["floor"] for row in rows if "floor" in row and row["ok"])
        of = {k: [(n, x) for kind, n, x in found if kind == k] for k in ("barrier", "node")}
        bandwidth = [(size, 1e9 * rate) for kind, size, rate in found if kind == "read"]
        flops = {dtype: 1e12 * rate for kind, dtype, rate in found if kind == "product"}
        return cls(Ceilings(flops, bandwidth), of["barrier"], of["node"])

    def floor(self, work: Work) -> float | None:
        """µs of this work; None where a rate that it needs was not measured."""
        waits = self.barriers if work.programs else self.nodes
        known = self.ceilings.bandwidth and work.dtype in self.ceilings.flops
        if not known or (work.waits and not waits):
            return None
        seconds, _ = self.ceilings.floor(Counts(work.flops, work.moved), work.dtype)
        return 1e6 * seconds + (work.waits and work.waits * of_size(waits, work.programs))


def give_floors(results: Mapping[str, list[Result]]) -> None:
    """Adds `floor_us` and `x_floor` to every timed row whose floor is known by now."""
    rates = Rates.of_rows(row for rows in results.values() for row in rows)
    for rows in results.values():
        for row in rows:
            least = rates.floor(Work(**row["work"])) if "work" in row else None
            if least is not None and "us" in row:
                row["floor_us"], row["x_floor"] = least, row["us"] / least


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
    Goal("all of these under a graph: times the floor", "floor", "x_floor", 1.5, 22, False),
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


def sequence_work(
    config: Any, dtype: str, batch: int, steps: int, hidden: int, width: int, training: bool
) -> Work:
    """A layer: from a table, or, in training, from inputs of `width`, forward and backward.

    Inference reads a row of gates a token and writes h. Training reads inputs and the gradient of
    h, writes h, and passes gates and c on to the backward pass, and gates' gradients to products.
    """
    tokens, programs = steps * batch, config.programs(hidden) if config is not None else 0
    recurrent = 8 * hidden * hidden
    if not training:
        moved = 2 * (tokens * 5 * hidden + 4 * hidden * hidden)
        return Work(moved, tokens * recurrent, dtype, steps, programs)
    moved = 2 * (tokens * (width + 2 * hidden) + 8 * hidden * (hidden + width))
    moved += tokens * hidden * (2 * 2 * 4 + 2 * 2 * 4 + 2 * 4)
    flops = tokens * (3 * recurrent + 2 * 8 * hidden * width)
    return Work(moved, flops, dtype, 2 * steps, programs)
