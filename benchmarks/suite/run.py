"""Runs cases: builds, checks against the reference, times, and gives records.

A record is a dict that JSON can hold: see `fusion_model.benchmarks.measure.records`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from fusion_model.benchmarks.measure.ceilings import Ceilings
from fusion_model.benchmarks.measure.timing import Timing, measure_in_turns, peak_memory
from fusion_model.benchmarks.suite import encoding, on_text, predictions, recurrence
from fusion_model.benchmarks.suite.cases import EAGER, Case
from fusion_model.benchmarks.suite.work import Context, Unavailable, Work, WrongResult

from fusion_model.errors import FusionLMError

Record = dict[str, Any]
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
KEPT = 200  # samples a record keeps, evenly over all of them
# By operation; each raises `Unavailable` where this machine cannot run the case.
BUILD: dict[str, Callable[[Case, Context], Work]] = {
    **dict.fromkeys(("step", "sequence", "prefixes"), recurrence.build),
    **dict.fromkeys(("training", "evaluation"), predictions.at_hand),
    "head": predictions.head,
    "embedding": encoding.embedding,
    "streaming": encoding.streaming,
    "scoring": on_text.scoring,
    "generation": on_text.generation,
}


def run(
    cases: Sequence[Case],
    context: Context,
    ceilings: Ceilings,
    budget: float,
    progress: Callable[[int, str], None] = lambda done, text: None,
) -> Iterator[Record]:
    """Measure group by group; each case gives one record, measured, skipped or wrong.

    Args:
        budget: seconds of samples for each case.
        progress: called with the number of cases done and what comes now.
    """
    done, device = 0, context.device
    for group, members in groupby(cases, key=lambda case: case.group):
        ready: dict[Case, tuple[Work, float]] = {}
        for case in members:
            progress(done, f"{group} {case.backend}")
            found = _checked(case, context)
            if isinstance(found, tuple):
                ready[case] = found
            else:
                yield found | case.facts()
            done += 1
        progress(done, group)
        runs = {case.backend: work.run for case, (work, _) in ready.items()}
        timings = measure_in_turns(runs, device, budget)
        yield from with_speedups(
            [
                record(case, work, first, timings[case.backend], ceilings, device)
                for case, (work, first) in ready.items()
            ]
        )
        context.forget()
    progress(done, "")


def _checked(case: Case, context: Context) -> tuple[Work, float] | Record:
    """What is timed, its result compared with the reference, and the seconds of its first call; or
    why it is not."""
    try:
        work = BUILD[case.operation](case, context)
        return work, work.check()
    except Unavailable as reason:
        return {"kind": "skip", "reason": str(reason)}
    except FusionLMError:
        raise  # the user's mistake
    except Exception as error:  # of a backend: the others are measured all the same
        said = next(iter(str(error).splitlines()), "")
        if isinstance(error, MemoryError) or any(sign in said for sign in OUT_OF_MEMORY):
            return {"kind": "skip", "reason": "out of memory"}
        name = "" if isinstance(error, WrongResult) else f"{type(error).__name__}: "
        return {"kind": "wrong", "reason": name + said}


def record(
    case: Case, work: Work, first: float, timing: Timing, ceilings: Ceilings, device: str
) -> Record:
    """What is kept of a measured case; times in milliseconds, rates in items a second."""
    p50 = timing.percentile(50)
    floor, bound = ceilings.floor(work.counts, "int8" if case.way == "onnx-int8" else case.dtype)
    step = max(1, len(timing.seconds) // KEPT)
    return (
        case.facts()
        | work.facts
        | {
            "kind": "case",
            **{f"p{q}_ms": round(1e3 * timing.percentile(q), 5) for q in (50, 90, 99)},
            "samples": len(timing.seconds),
            "first_ms": round(1e3 * first, 3),
            "items": work.items,
            "per_second": round(work.items / p50, 1),
            "flops": work.counts.flops,
            "bytes": work.counts.bytes,
            "floor_ms": float(f"{1e3 * floor:.4g}"),
            "bound": bound,
            "of_floor": round(floor / p50, 4),
            "peak_bytes": None if "onnx" in case.way else peak_memory(work.run, device),
            "times_ms": [float(f"{1e3 * s:.4g}") for s in timing.seconds[::step]],
        }
    )


def with_speedups(records: Sequence[Record]) -> list[Record]:
    """The records of a run, each with its rate relative to the eager one of its group, which may
    have fewer items a call."""
    rates = [r["items"] / r["p50_ms"] for r in records]
    pairs = list(zip(records, rates, strict=True))
    eager = {r["group"]: rate for r, rate in pairs if r["backend"] == EAGER}
    return [
        r | ({"speedup": round(rate / eager[r["group"]], 4)} if r["group"] in eager else {})
        for r, rate in pairs
    ]
