"""A profile as a table, a plot and files."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusion_model.benchmarks.profile.engines import PARTS
from rich.table import Table

from fusion_model.errors import FusionLMError
from fusion_model.files import write_text

PLOTS = (".svg", ".png", ".pdf")
MEMORY = (("process_mb", "now"), ("peak_mb", "at most"), ("gpu_peak_mb", "on the GPU at most"))
# Dark enough on white, light enough on black.
COLOURS = ("#b87400", "#3b7dd8", "#0f8f83", "#9a5fd0", "#8a929b")


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """Times, and what they were spent on."""
    generation, scoring = found["generation"], found["scoring"]
    times = Table(title="latency, ms", title_justify="left", box=None, pad_edge=False)
    times.add_column("")
    for name in ("p50", "p90", "p99", "mean", "jitter"):
        times.add_column(name, justify="right", min_width=8)
    rows = {
        "first token, prompt included": generation["first_token_ms"],
        "each later token": generation["token_ms"],
        "scoring, a call": scoring["call_ms"],
    }
    for label, spread in rows.items():
        times.add_row(label, *(f"{spread[q]:.2f}" for q in ("p50", "p90", "p99", "mean", "jitter")))
    yield times
    columns = {
        "first token": generation["first_token_parts_ms"],
        "later token": generation["token_parts_ms"],
        "scored word": scoring["word_parts_ms"],
    }
    parts = Table(title="spent on, mean ms", title_justify="left", box=None, pad_edge=False)
    parts.add_column("")
    for name in columns:
        parts.add_column(name, justify="right", min_width=10)
        parts.add_column("", justify="right")
    for part in (*PARTS, "all"):
        cells = []
        for column in columns.values():
            whole = sum(column.values())
            value = whole if part == "all" else column[part]
            cells += [f"{value:.3f}", f"[dim]{value / whole:.0%}[/]"]
        parts.add_row(part, *cells, end_section=part == PARTS[-1])
    yield parts


def lines(found: dict[str, Any]) -> list[str]:
    """What the tables do not say."""
    generation, scoring = found["generation"], found["scoring"]
    memory, energy = found["memory"], found["energy_joules"]
    policy = found["settings"].get("policy")
    said = [
        f"{generation['tokens_per_second']:,.0f} tokens/s generated, "
        f"{scoring['words_per_second']:,.0f} words/s scored; batch {found['settings']['batch']}"
        + (f"; encoding policy {policy}" if policy else ""),
        f"parts add up to {generation['parts_over_whole']:.1%} of the whole of generation and "
        f"{scoring['parts_over_whole']:.1%} of scoring, each measured without them",
        "memory, MB: " + ", ".join(f"{memory[k]:,.0f} {v}" for k, v in MEMORY if k in memory),
        "energy: " + ("no NVML here" if energy is None else f"{energy:.1f} J for all of it"),
    ]
    if found["settings"]["engine"] == "onnx":
        one = "an export's step is one graph: "
        if found["settings"]["device"] == "cpu":
            said.append(one + "ONNX Runtime's profile of its nodes tells the vocabulary's share")
        else:
            said.append(one + "LSTM and fusion holds the vocabulary, too")
    return said


def check_plot(path: Path | None) -> None:
    """Raise `FusionLMError` for a plot that cannot be written, before anything is measured."""
    if path is not None and path.suffix not in PLOTS:
        raise FusionLMError(f"--plot {path}: end its name in one of {', '.join(PLOTS)}")
    if path is not None and find_spec("matplotlib") is None:
        raise FusionLMError("--plot needs matplotlib: pip install matplotlib, or leave it out")


def plot(found: dict[str, Any], path: Path) -> None:
    """Latency against position: stages stacked, with p50 and p99 of the whole."""
    from fusion_model.benchmarks.page.charts import STYLE, axes_of
    from matplotlib import rc_context

    rows = found["generation"]["by_position"]
    x = [row["position"] for row in rows]
    with rc_context(STYLE):
        figure, axes = axes_of(8.5, 4, "tokens before it", "ms a token")
    axes.stackplot(
        x,
        *([row["parts"][part] for row in rows] for part in PARTS),
        labels=[f"{part} (mean)" for part in PARTS],
        colors=COLOURS,
        alpha=0.85,
        linewidth=0,
    )
    axes.plot(x, [row["p50"] for row in rows], color="black", linewidth=1.6, label="p50")
    axes.plot(x, [row["p99"] for row in rows], color="black", linewidth=1, ls=":", label="p99")
    axes.set(ylim=(0, None), xlim=(x[0], x[-1]))
    axes.set_title(found["title"], loc="left", fontsize=10)
    figure.legend(loc="outside right center", reverse=True)  # as stacked
    with rc_context(STYLE):
        figure.savefig(path, dpi=160)


def write_json(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    """A file for machines."""
    write_text(path, json.dumps(content, indent=indent) + "\n")
