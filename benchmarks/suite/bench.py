"""What `fusion-lm bench` does: choose cases, run them, show a ranked table."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fusion_model.benchmarks.measure import records as results
from fusion_model.benchmarks.measure.ceilings import has_bfloat16, measure_ceilings
from fusion_model.benchmarks.measure.counts import SIZE
from fusion_model.benchmarks.measure.machine import describe, where
from fusion_model.benchmarks.profile.latency import check_words
from fusion_model.benchmarks.suite.cases import OPERATIONS, WAYS, Case, cases, own_cases
from fusion_model.benchmarks.suite.run import run
from fusion_model.benchmarks.suite.work import Context
from rich.table import Table

from fusion_model import progress
from fusion_model.data.text import read_documents
from fusion_model.errors import FusionLMError
from fusion_model.loading import load_model

SAMPLE = "samples/thursday.txt"  # beside fusion_model/__init__.py
BUDGETS = {"tiny": 0.0, "quick": 0.3, "full": 2.0, "figures": 1.0}  # seconds of samples a case
WORDS = {"tiny": 5, "quick": 80, "full": 400, "figures": 250}  # of the text that is used
FEWEST_WORDS = 4
Record = dict[str, Any]


def opening(sentences: Sequence[str], words: int) -> list[str]:
    """Whole sentences from the beginning, up to about `words` words; of the first at least some.

    Raises:
        FusionLMError: the text has fewer than `FEWEST_WORDS` words.
    """
    check_words(sentences, FEWEST_WORDS, "a benchmark")
    found: list[str] = []
    left = words
    for sentence in sentences:
        own = sentence.split()
        if found and len(own) > left:
            break
        found.append(" ".join(own[: max(left, FEWEST_WORDS)]))
        left -= len(own)
    return found


def context_of(model: str, text: Sequence[str], device: str, suite: str, scratch: Path) -> Context:
    """What the cases share; the text defaults to the sample that ships."""
    import fusion_model

    sources = list(text) or [str(Path(fusion_model.__file__).parent / SAMPLE)]
    sentences = [s for document in read_documents(sources) for s in document.sentences]
    used = opening(sentences, WORDS[suite])
    return Context(device, model, used, scratch, new_tokens=4 if suite == "tiny" else 32)


def chosen_cases(
    suite: str, only: Sequence[str], shape: Record, backend: str | None, model: str | None
) -> list[Case]:
    """The suite's cases, or those of the user's own shape or model.

    Raises:
        FusionLMError: an unknown operation, backend or dtype; nothing is left.
    """
    only = [*only, backend] if backend else list(only)
    known = [name for name in SIZE if name != "int8"]
    if shape.get("dtype") not in (None, *known):
        raise FusionLMError(f"unknown dtype {shape['dtype']!r}: choose one of {', '.join(known)}")
    if not shape and model is None:
        return cases(suite, only)
    on_text: list[Case] = []
    left_out: tuple[str, ...] = ()
    if model is not None:
        config = load_model(model)[0].config
        sizes = ("hidden_size", "embedding_size", "vocab_size", "prefix_size")
        dtype = {name: value for name, value in shape.items() if name == "dtype"}
        shape = {name: getattr(config, name) for name in sizes} | shape
        of_suite = [c for c in cases(suite, only) if c.operation in ("scoring", "generation")]
        on_text = [replace(c, **dtype) for c in of_suite]
        if config.fusion != "concat" or config.num_layers > 1:
            left_out = ("training", "evaluation")
    own = own_cases({"batch": 1, "length": 64} | shape, only)
    found = [c for c in own if c.operation not in left_out]
    if len(found) < len(own):
        progress.note("training and evaluation left out: written for one layer and concat alone")
    if not found + on_text:
        raise FusionLMError(
            f"of {', '.join(only)} there is nothing to measure with "
            f"{'a shape' if model is None else model}"
        )
    return found + on_text


def affordable(chosen: Sequence[Case], device: str) -> list[Case]:
    """Without bfloat16 where the device has no hardware for it, unless nothing else of an operation
    was asked for. A note says so."""
    if has_bfloat16(device):
        return list(chosen)
    others = {c.operation for c in chosen if c.dtype != "bfloat16"}
    kept = [c for c in chosen if c.dtype != "bfloat16" or c.operation not in others]
    if left_out := len(chosen) - len(kept):
        progress.note(
            f"{left_out} cases in bfloat16 left out: there is no hardware for it here, so that it "
            "takes a hundred times as long as float32"
        )
    return kept


def bench(
    chosen: Sequence[Case],
    suite: str,
    model: str,
    text: Sequence[str],
    device: str,
    keep: Path | None,
    command: str,
) -> tuple[Record, list[Record]]:
    """Measure, with a bar that shows the time left, and append the results to `keep`.

    Returns:
        The run and its records.

    Raises:
        FusionLMError: a text without words.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32, of all that is compared
    with ExitStack() as closing:
        scratch = closing.enter_context(tempfile.TemporaryDirectory(prefix="fusion-lm-bench-"))
        context = context_of(model, text, device, suite, Path(scratch))
        closing.enter_context(context.closing)
        chosen = affordable(chosen, device)
        progress.note(f"{len(chosen)} cases on {where(describe(device))}")
        words = sum(len(s.split()) for s in context.sentences)
        int8 = {"int8" for c in chosen if c.way == "onnx-int8"}
        ceilings = measure_ceilings(device, sorted({c.dtype for c in chosen} | int8))
        first = results.run_line(
            describe(device),
            ceilings,
            suite=suite,
            command=command,
            model=model,
            text={"source": ", ".join(text) or SAMPLE, "words": words},
        )
        with progress.track("measuring", len(chosen)) as update:
            measured = run(chosen, context, ceilings, BUDGETS[suite], update)
            if keep is not None:
                measured = results.append(keep, first, measured)
            return first, list(measured)


def ranked(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Groups in the order of measurement, fastest backend first."""
    groups: dict[str, list[Record]] = {}
    for record in results.measured(records):
        groups.setdefault(record["group"], []).append(record)
    return [
        (name, sorted(group, key=lambda r: r["p50_ms"] / r["items"]))
        for name, group in groups.items()
    ]


# Of a row of a table, for a terminal; `PAGE_COLUMNS` has the room for more.
COLUMNS: dict[str, Callable[[Record], str]] = {
    "× plain": lambda r: f"{r['speedup']:.2f}" if "speedup" in r else "",
    "p50 ms": lambda r: _digits(r["p50_ms"]),
    "p90": lambda r: _digits(r["p90_ms"]),
    "p99": lambda r: _digits(r["p99_ms"]),
    "per s": lambda r: f"{r['per_second']:,.0f}",
    "of floor": lambda r: f"{r['of_floor']:.1%}",
    "first ms": lambda r: _digits(r["first_ms"]),
}
PAGE_COLUMNS = COLUMNS | {
    "floor": lambda r: f"{_digits(r['floor_ms'])} ms, {r['bound']}",
    "memory": lambda r: "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:,.1f} MB",
    "samples": lambda r: str(r["samples"]),
}


def _digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """One a group: times, rate, ratio to plain PyTorch, share of the floor."""
    for group, members in ranked(records):
        title = f"[bold]{OPERATIONS[members[0]['operation']]}[/]\n[dim]{group}[/]"
        shown = Table(
            title=title, title_justify="left", title_style="", box=None, padding=(0, 0, 0, 1)
        )
        shown.add_column("", width=max(len(r["backend"]) for r in members), no_wrap=True)
        for name in COLUMNS:
            shown.add_column(name, justify="right", min_width=5, no_wrap=True, header_style="dim")
        for r in members:
            ratio = r.get("speedup", 1)
            colour = "green" if ratio >= 1.05 else "red" if ratio < 0.95 else "dim"
            speedup, *cells = (cell(r) for cell in COLUMNS.values())
            shown.add_row(r["backend"], f"[{colour}]{speedup}[/]", *cells)
        yield shown


def warnings(records: Sequence[Record]) -> list[str]:
    """Whether the times hold, and the floors: what to know before reading them."""
    timed = results.measured(records)
    found = []
    if uneven := sum(not results.is_even(r) for r in timed):
        found.append(
            f"uneven: in {uneven} cases p90 is over {results.UNEVEN} times p50, so the machine did "
            "something else meanwhile; measure again when it is idle, or with OMP_NUM_THREADS=1"
        )
    if above := [f"{r['group']} {r['backend']}" for r in timed if r["of_floor"] > 1]:
        found.append(f"above 100 % of the floor, which was measured too high: {', '.join(above)}")
    return found


def policies(records: Sequence[Record]) -> list[str]:
    """Of each group whose backends encode by several policies, which ones do by which."""
    found: dict[str, dict[str, list[str]]] = {}
    for r in results.measured(records):
        if "policy" in r:
            found.setdefault(r["group"], {}).setdefault(r["policy"], []).append(r["backend"])
    return [
        f"{group}: encoded by "
        + "; ".join(f"policy {policy}: {', '.join(names)}" for policy, names in own.items())
        for group, own in found.items()
        if len(own) > 1
    ]


def remarks(records: Sequence[Record]) -> list[str]:
    """What was skipped and why, once for each backend; what was wrong; `policies`, `warnings`."""
    skipped = Counter((r["backend"], r["reason"]) for r in records if r["kind"] == "skip")
    return [
        *(f"skipped {name} ({n}): {reason}" for (name, reason), n in skipped.items()),
        *(
            f"WRONG {r['group']} {r['backend']}: {r['reason']}; not timed"
            for r in records
            if r["kind"] == "wrong"
        ),
        *policies(records),
        *warnings(records),
    ]


def glossary(records: Sequence[Record]) -> dict[str, str]:
    """The backends that appear, and what each is."""
    ways = dict.fromkeys(r["backend"].partition("/")[0] for r in records)
    return {way: WAYS[way][0] for way in ways}
