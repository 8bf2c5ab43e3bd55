"""One self-contained HTML page of a run: no script, no network, light and dark, fit for print."""

from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from fusion_model.benchmarks.measure.machine import where
from fusion_model.benchmarks.measure.records import measured
from fusion_model.benchmarks.page import charts
from fusion_model.benchmarks.page.charts import number
from fusion_model.benchmarks.suite.bench import PAGE_COLUMNS, glossary, ranked, remarks, warnings
from fusion_model.benchmarks.suite.cases import OPERATIONS

Record = dict[str, Any]
AXES = {"batch": "sequences a batch", "hidden_size": "hidden size", "length": "tokens a sequence"}
TILES = ("scoring", "generation", "embedding", "training")
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
        _method(run, records),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fusion-lm benchmark, {escape(where(run['machine']))}</title>"
        f"<style>{style}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _header(run: Record, timed: Sequence[Record]) -> str:
    tiles = [
        f'<li class="tile"><span>{OVERVIEW[r["operation"]]}</span><b>{number(r["per_second"])} '
        f"<small>{r['unit']}/s</small></b><span>{r['speedup']:.2f} × plain PyTorch</span></li>"
        for name in TILES
        for r in [r for r in timed if r["operation"] == name and _stands(r) == "fusion-lm"][:1]
    ]
    chart = overview(timed)
    return (
        "<header><h1>How fast fusion-lm is here</h1>"
        f'<p class="soft">{escape(where(run["machine"]))}, commit '
        f"{escape(run['machine']['commit'] or 'unknown')}; {run['text']['words']} words of "
        f"{escape(run['text']['source'])}</p>"
        f"{''.join(f'<p><b>{escape(line)}</b></p>' for line in warnings(timed))}"
        f'<ul class="tiles">{"".join(tiles)}</ul>'
        f"{_figure(chart, 'Speed relative to plain PyTorch') if chart else ''}"
        '<p class="soft key">Below, fastest first: the time of a call (the bar: of each token or '
        "prefix), and × the speed relative to plain PyTorch (eager) in the same turns. The floor "
        "is the least time that bytes and operations allow on this machine; the first call holds "
        "compilation and cold caches; memory is what a call holds beyond weights and inputs by "
        "PyTorch's allocator, at most. B sequences, T tokens each, H hidden units.</p></header>"
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


def _operation(name: str, timed: Sequence[Record]) -> str:
    """Curves where shapes differ in one number, and the first shape's figures; then the others'."""
    own = [r for r in timed if r["operation"] == name]
    if not own:
        return ""
    title, curves = OPERATIONS[name], [curve for axis in AXES if (curve := _curve(own, axis))]
    first, *more = (_group(group, members) for group, members in ranked(own))
    shapes = f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>"
    return (
        f"<section><h2>{escape(title[0].upper() + title[1:])}</h2>"
        f'<div class="pair">{"".join(curves)}</div>{first}{shapes if more else ""}</section>'
    )


def _group(group: str, members: Sequence[Record]) -> str:
    """What is compared: a row a backend, its median for one item as a bar."""
    each = {r["backend"]: r["p50_ms"] / r["items"] for r in members}
    rows = []
    for r in members:
        width = 100 * each[r["backend"]] / max(each.values())
        style = f"width:{width:.1f}%;background:{charts.colour(r['backend'])}"
        cells = "".join(f'<td class="n">{escape(cell(r))}</td>' for cell in PAGE_COLUMNS.values())
        bar = f'<td class="bar"><i style="{style}"></i></td>'
        rows.append(f"<tr><td>{escape(r['backend'])}</td>{bar}{cells}</tr>")
    head = "".join(f'<th class="n">{name}</th>' for name in PAGE_COLUMNS)
    return (
        f'<h3>{escape(group)}</h3><div class="scroll"><table><thead><tr><th></th><th></th>{head}'
        f"</tr></thead>{''.join(rows)}</table></div>"
    )


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


def _pairs(facts: Record) -> str:
    rows = (f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{''.join(rows)}</table>"


def _method(run: Record, records: Sequence[Record]) -> str:
    machine, bandwidth = run["machine"], run["ceilings"]["bandwidth"]
    ends = bandwidth[:: max(1, len(bandwidth) - 1)]  # a buffer in a cache, one in memory
    products = (f"{name} {number(rate)}FLOP/s" for name, rate in run["ceilings"]["flops"].items())
    facts = machine | {
        "versions": ", ".join(f"{name} {v}" for name, v in machine["versions"].items()),
        "products of matrices": ", ".join(products),
        "reading": ", ".join(f"{number(rate)}B/s of {number(size)}B" for size, rate in ends),
        "model": run["model"],
        "text": f"{run['text']['words']} words of {run['text']['source']}",
    }
    notes = "".join(f"<li>{escape(line)}</li>" for line in remarks(records))
    skipped = f"<h3>Not measured</h3><ul>{notes}</ul>" if notes else ""
    return (
        f"<section><h2>What was measured, and where</h2>{_pairs(facts)}"
        f"<h3>Backends</h3>{_pairs(glossary(records))}{skipped}"
        "<p>Every case was compared with a reference in float64 or float32 before it was timed; "
        "inputs are random, never zeros. Floors are of the fastest product of matrices and of "
        "reading a buffer that fits a cache, or one that does not, as measured in this run.</p>"
        f"<h3>To repeat it</h3><pre>{escape(run['command'])}</pre></section>"
    )
