"""One self-contained HTML page of a run: no script, no network, light and dark, fit for print."""

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from typing import Any

from fusion_model.benchmarks.measure.machine import where
from fusion_model.benchmarks.measure.records import measured
from fusion_model.benchmarks.page import charts
from fusion_model.benchmarks.page.charts import milliseconds, number
from fusion_model.benchmarks.suite.bench import glossary, ranked, remarks, warnings
from fusion_model.benchmarks.suite.cases import EAGER, OPERATIONS

Record = dict[str, Any]
AXES = {"batch": "sequences a batch", "hidden_size": "hidden size", "length": "tokens a sequence"}
TILES = {
    "scoring": "scoring your text",
    "generation": "writing, token by token",
    "embedding": "prefix embeddings",
    "training": "training",
}
COMPARED = {"auto": "fusion-lm", "fusion-lm": "fusion-lm"} | {
    name: name
    for name in ("onnx", "compile", "cuda-graph", "sentence-transformers", "published", "flashrnn")
}
OVERVIEW = {
    "scoring": "scoring a text",
    "generation": "generating text",
    "embedding": "prefix embeddings",
    "training": "training step",
    "evaluation": "surprisal, embeddings at hand",
    "prefixes": "all prefixes, early fusion",
    "head": "log-probabilities",
    "sequence": "LSTM, sequences",
    "step": "LSTM, one step",
}
FIXED = ("operation", "dtype", "batch", "length", "hidden_size", "embedding_size", "vocab_size")


def page(run: Record, records: Sequence[Record]) -> str:
    """The page as HTML."""
    timed = measured(records)
    style = resources.files("fusion_model.benchmarks.page").joinpath("report.css").read_text()
    sections = [
        _header(run, timed),
        *(_operation(name, timed) for name in OPERATIONS),
        _distributions(timed),
        _roofline(run, timed),
        _memory(timed),
        _figures(timed),
        _method(run, records),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fusion-lm benchmark, {escape(where(run['machine']))}</title>"
        f"<style>{style}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _header(run: Record, timed: Sequence[Record]) -> str:
    tiles = []
    for operation in TILES:
        own = [r for r in timed if r["operation"] == operation and _stands(r) == "fusion-lm"][:1]
        for r in own:
            each = milliseconds(r["p50_ms"] / r["items"])
            tiles.append(
                f'<li class="tile"><span>{TILES[operation]}</span><b>{number(r["per_second"])}'
                f" <small>{r['unit']}/s</small></b><span>{each} each, {r['speedup']:.2f} × plain "
                "PyTorch</span></li>"
            )
    chart = overview(timed)
    return (
        "<header><h1>How fast fusion-lm is here</h1>"
        f'<p class="soft">{escape(where(run["machine"]))}, commit '
        f"{escape(run['machine']['commit'] or 'unknown')}; {run['text']['words']} words of "
        f"{escape(run['text']['source'])}</p>"
        f"{''.join(f'<p><b>{escape(line)}</b></p>' for line in warnings(timed))}"
        f'<ul class="tiles">{"".join(tiles)}</ul>'
        f"{_figure(chart, 'Speed relative to plain PyTorch') if chart else ''}"
        '<p class="soft key">Below, bars show the median time of a call, and the thin line goes '
        "on to p90; × is the speed relative to plain PyTorch (eager), above 1 is faster. B "
        "sequences, T tokens each, H hidden units. Point at a mark for its figures.</p></header>"
    )


def _stands(r: Record) -> str:
    """The way that a record stands for in the overview; nothing for further variants of one."""
    way, _, variant = r["backend"].partition("/")
    exact = "every" if r["operation"] == "embedding" else "incremental"
    return COMPARED.get(way, "") if variant in ("", "32", exact) and "speedup" in r else ""


def overview(timed: Sequence[Record]) -> str:
    """Speed relative to plain PyTorch, in batches where it can be, of the backends that matter
    most, of each first shape."""
    rows: dict[str, list[tuple[str, float]]] = {}
    for name, title in OVERVIEW.items():
        groups = ranked([r for r in timed if r["operation"] == name])
        members = groups[0][1] if groups else []
        batched = next((r["speedup"] for r in members if r["backend"] == "batched"), 1.0)
        shown = [(way, r["speedup"] / batched) for r in members if (way := _stands(r))]
        if shown:
            rows[title] = shown
    if not rows:
        return ""
    used = [n for n in dict.fromkeys(COMPARED.values()) if any(n in dict(r) for r in rows.values())]
    return charts.ratios(rows, used)


def _figure(svg: str, title: str = "", caption: str = "") -> str:
    head = f"<h3>{escape(title)}</h3>" if title else ""
    foot = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{head}{charts.inline(svg)}{foot}</figure>"


def _bar(r: Record) -> charts.Bar:
    ratio = f"{r['speedup']:.2f} ×" if "speedup" in r and r["backend"] != EAGER else ""
    label = " · ".join(filter(None, (milliseconds(r["p50_ms"]), ratio)))
    tip = (
        f"{r['backend']}: p50 {milliseconds(r['p50_ms'])}, p90 {milliseconds(r['p90_ms'])}, "
        f"p99 {milliseconds(r['p99_ms'])}, {number(r['per_second'])} {r['unit']}/s, "
        f"{r['of_floor']:.1%} of the floor"
    )
    return charts.Bar(r["backend"], r["p50_ms"], label, tip, r["p90_ms"])


def _operation(name: str, timed: Sequence[Record]) -> str:
    own = [r for r in timed if r["operation"] == name]
    if not own:
        return ""
    title = OPERATIONS[name]
    parts = [f"<section><h2>{escape(title[0].upper() + title[1:])}</h2>"]
    figures = [curve for axis in AXES if (curve := _curve(own, axis))]
    if figures:
        parts.append(f'<div class="pair">{"".join(figures)}</div>')
    groups = ranked(own)
    for i, (group, members) in enumerate(groups):
        if figures and i == 1:
            parts.append(f"<details><summary>{len(groups) - 1} more shapes</summary>")
        chart = charts.bars([_bar(r) for r in members], "ms a call: median, the line to p90")
        parts.append(_figure(chart, group.removeprefix(name + " ")))
    parts.append("</details>" if figures and len(groups) > 1 else "")
    return "".join(parts) + "</section>"


def _curve(own: Sequence[Record], axis: str) -> str:
    """Throughput against one number, with all others as in the most points found."""
    fixed = [name for name in FIXED if name != axis]
    families: dict[tuple[Any, ...], list[Record]] = {}
    for r in own:
        families.setdefault(tuple(r[name] for name in fixed), []).append(r)
    family = max(families.values(), key=lambda f: len({r[axis] for r in f}))
    if len({r[axis] for r in family}) < 3:
        return ""
    series: dict[str, list[tuple[float, float]]] = {}
    for r in sorted(family, key=lambda r: r[axis]):
        series.setdefault(r["backend"], []).append((r[axis], r["per_second"]))
    first = family[0]
    rest = {"batch": "B", "length": "T", "hidden_size": "H"}
    fixed_text = ", ".join(f"{s} = {first[n]}" for n, s in rest.items() if n != axis)
    chart = charts.curves(series, AXES[axis], f"{first['unit']}/s")
    return _figure(chart, caption=f"{fixed_text}, {first['dtype']}")


def _section(title: str, text: str, figures: Sequence[str]) -> str:
    """Nothing where there is no figure."""
    if not figures:
        return ""
    return f"<section><h2>{title}</h2><p>{text}</p>{''.join(figures)}</section>"


def _distributions(timed: Sequence[Record]) -> str:
    figures = []
    for operation in ("step", "generation"):
        for name, members in ranked([r for r in timed if r["operation"] == operation])[:1]:
            rows = {r["backend"]: r["times_ms"] for r in members}
            figures.append(_figure(charts.distributions(rows, "time of a call"), name))
    return _section(
        "Latency, call by call",
        "Each stroke is one call; the bold line is the median, the thin one p90, the dotted one "
        "p99. The backends took turns, so a disturbance of the machine shows in all of them.",
        figures,
    )


def _roofline(run: Record, timed: Sequence[Record]) -> str:
    return _section(
        "How far from what this machine can do",
        "Work and compulsory traffic are counted; the ceilings were measured in the same run: the "
        "fastest product of matrices, the fastest reading of a buffer that fits a cache and of one "
        "that does not. A recurrence is a chain, so small batches cannot reach the roof.",
        [_figure(charts.roofline(run["ceilings"], timed))] if timed else [],
    )


def _memory(timed: Sequence[Record]) -> str:
    figures = []
    for operation in OPERATIONS:
        groups = ranked([r for r in timed if r["operation"] == operation and r["peak_bytes"]])
        if groups:
            name, members = max(groups, key=lambda g: max(r["peak_bytes"] for r in g[1]))
            found = sorted((r["peak_bytes"], r["backend"]) for r in members)
            rows = [charts.Bar(b, n, f"{number(n)}B", f"{b}: {n:,} bytes") for n, b in found]
            figures.append(_figure(charts.bars(rows, "bytes"), name))
    return _section(
        "Memory",
        "The most that one call holds beyond weights and inputs, as PyTorch's allocator counts it; "
        "the largest shape of each operation. ONNX Runtime keeps its own and is not counted.",
        figures,
    )


COLUMNS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("p50", lambda r: milliseconds(r["p50_ms"])),
    ("p90", lambda r: milliseconds(r["p90_ms"])),
    ("p99", lambda r: milliseconds(r["p99_ms"])),
    ("per second", lambda r: number(r["per_second"])),
    ("× plain", lambda r: f"{r['speedup']:.2f}" if "speedup" in r else ""),
    ("floor", lambda r: f"{milliseconds(r['floor_ms'])}, {r['bound']}"),
    ("reached", lambda r: f"{r['of_floor']:.1%}{' (!)' * (r['of_floor'] > 1)}"),
    ("first call", lambda r: milliseconds(r["first_ms"])),
    ("samples", lambda r: str(r["samples"])),
)


def _figures(timed: Sequence[Record]) -> str:
    head = "".join(f'<th class="n">{name}</th>' for name, _ in COLUMNS)
    rows = []
    for group, members in ranked(timed):
        rows.append(f'<tr class="group"><td colspan="{len(COLUMNS) + 1}">{escape(group)}</td></tr>')
        for r in members:
            cells = "".join(f'<td class="n">{escape(cell(r))}</td>' for _, cell in COLUMNS)
            rows.append(f"<tr><td>{escape(r['backend'])}</td>{cells}</tr>")
    return (
        '<section><h2>All figures</h2><p class="soft">Fastest first. “× plain” compares with plain '
        "PyTorch (eager) in the same turns; the first call holds compilation and cold caches.</p>"
        f'<div class="scroll"><table><thead><tr><th>backend</th>{head}</tr></thead>{"".join(rows)}'
        "</table></div>"
        "</section>"
    )


def _pairs(facts: Record) -> str:
    rows = (f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{''.join(rows)}</table>"


def _method(run: Record, records: Sequence[Record]) -> str:
    machine = run["machine"]
    facts = {
        "device": machine["name"],
        "clock": f"{machine.get('gpu_mhz') or machine['cpu_mhz']} MHz",
        "threads": f"{machine['threads']} of {machine['cores']} cores",
        "memory": f"{machine['memory_gb']} GB",
        "load before": ", ".join(map(str, machine["load"])),
        "system": f"{machine['system']}, Python {machine['python']}",
        "libraries": ", ".join(f"{name} {v}" for name, v in machine["versions"].items()),
        "commit": machine["commit"] or "unknown",
        "date": machine["date"],
        "model": run["model"],
        "text": f"{run['text']['words']} words of {run['text']['source']}",
    }
    notes = "".join(f"<li>{escape(line)}</li>" for line in remarks(records))
    skipped = f"<h3>Not measured</h3><ul>{notes}</ul>" if notes else ""
    return (
        f"<section><h2>What was measured, and where</h2>{_pairs(facts)}"
        f"<h3>Backends</h3>{_pairs(glossary(records))}{skipped}"
        "<p>Every case was compared with a reference in float64 or float32 before it was timed; "
        "inputs are random, never zeros.</p>"
        f"<h3>To repeat it</h3><pre>{escape(run['command'])}</pre></section>"
    )
