"""Charts of the page: matplotlib's SVG, dark on white; a mark tells its figures when pointed at."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDTH = 9.5  # inches
COLOURS = {
    "auto": "#1f6feb",
    "fusion-lm": "#1f6feb",
    "torch": "#4fa3d9",
    "reference": "#0f8f83",
    "triton": "#7a4fd0",
    "eager": "#6b737c",
    "compile": "#b87400",
    "onnx": "#3d8b37",
    "onnx-int8": "#7d8f00",
    "published": "#c4432f",
    "cuda-graph": "#bf3f8a",
    "sentence-transformers": "#8a5a3c",
    "flashrnn": "#b59f00",
    "cudnn": "#444c8c",
    "batched": "#9aa3ab",
    "sentence-transformers-onnx": "#c08a5a",
}
STYLES = ("-", "--", ":", "-.")  # of one backend's variants
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fusion-lm",  # the same results give the same file
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "0.88",
    "legend.frameon": False,
}
NO_DATE: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def number(x: float) -> str:
    """Three digits and a unit."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


def milliseconds(x: float) -> str:
    """With the unit that reads best."""
    if x < 1:
        return f"{1e3 * x:.3g} µs"
    return f"{x:.3g} ms" if x < 1000 else f"{x / 1e3:.3g} s"


def colour(name: str) -> str:
    """Of a backend, whatever follows its slash."""
    return COLOURS[name.partition("/")[0]]


class Chart:
    """One pair of axes in the making; `svg` ends it. Sizes in inches."""

    def __init__(self, width: float, height: float, x_title: str, y_title: str = "") -> None:
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.axes: Axes = self.figure.subplots()
        self.axes.set(xlabel=x_title, ylabel=y_title)
        self._tips: list[str] = []

    def tip(self, artist: Artist, text: str) -> None:
        """What pointing at a mark tells."""
        artist.set_gid(f"tip-{len(self._tips)}-")
        self._tips.append(text)

    def rows(self, names: Sequence[str]) -> None:
        """A row a name, the first on top."""
        self.axes.set_yticks(range(len(names)), names)
        self.axes.set_ylim(len(names) - 0.4, -0.6)
        self.axes.tick_params(axis="y", length=0)
        self.axes.grid(axis="y", visible=False)

    def svg(self) -> str:
        """The chart as a file of its own."""
        file = StringIO()
        self.figure.savefig(file, format="svg", metadata=NO_DATE)
        svg = re.sub(r'<g id="(?!tip-)\w[\w.]*_\d+">', "<g>", file.getvalue())
        for n, text in enumerate(self._tips):
            svg = svg.replace(f'<g id="tip-{n}-">', f"<g><title>{escape(text)}</title>")
        return svg


def inline(svg: str) -> str:
    """As it stands in an HTML page, which needs no header, namespaces or size."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    return svg[svg.index("<svg") :]


def _logarithmic(axes: Axes, which: str, text: Callable[[float], str] = number) -> None:
    """The axis `x` or `y`: ticks at powers of ten, with digits between where there are few."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    spread = np.log10(high / low)
    digits = (1, 1.5, 2, 3, 4, 6, 8) if spread < 1.1 else (1, 2, 5) if spread < 2.2 else (1,)
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda x, _: text(x)))
    axis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, text: str, x: float, y: float, points: float) -> None:
    """Text so many points to the right of a place, or to its left."""
    side: Any = "left" if points > 0 else "right"
    offset = {"xytext": (points, 0), "textcoords": "offset points"}
    axes.annotate(text, (x, y), ha=side, va="center", **offset)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bar:
    """A backend's bar: its length, what stands at its end, and what pointing at it tells."""

    name: str
    value: float
    label: str
    tip: str
    whisker: float | None = None


@rc_context(STYLE)
def bars(rows: Sequence[Bar], x_title: str) -> str:
    """Horizontal bars from zero; a thin line goes on to each whisker."""
    chart = Chart(WIDTH, 0.65 + 0.28 * len(rows), x_title)
    most = max(max(r.value, r.whisker or 0) for r in rows) or 1.0
    shown = min(most, 2.2 * max(r.value for r in rows))  # one wild p90 must not flatten the rest
    for i, row in enumerate(rows):
        (bar,) = chart.axes.barh(i, row.value, height=0.68, color=colour(row.name))
        chart.tip(bar, row.tip)
        reach = min(max(row.value, row.whisker or 0), shown)
        chart.axes.plot([row.value, reach], [i, i], color=colour(row.name), marker="|")
        _label(chart.axes, row.label, reach, i, 7)
    chart.rows([r.name for r in rows])
    chart.axes.set_xlim(0, 1.22 * shown)
    chart.axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
    return chart.svg()


@rc_context(STYLE)
def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str) -> str:
    """Lines over a logarithmic plane; the legend in the order in which they end."""
    chart = Chart(5.4, 2.7, x_title, y_title)
    drawn: list[str] = []
    for name, line in sorted(series.items(), key=lambda item: -item[1][-1][1]):
        style = STYLES[drawn.count(colour(name)) % len(STYLES)]
        drawn.append(colour(name))
        chart.axes.plot(*zip(*line, strict=True), style, color=colour(name), label=name)
        for a, b in line:
            (dot,) = chart.axes.plot(a, b, "o", markersize=4, color=colour(name))
            chart.tip(dot, f"{name}, {x_title} {number(a)}: {number(b)} {y_title}")
    _logarithmic(chart.axes, "x")
    _logarithmic(chart.axes, "y")
    chart.axes.set_xticks(sorted({x for line in series.values() for x, _ in line}), minor=False)
    chart.axes.minorticks_off()
    chart.figure.legend(loc="outside right center", fontsize=9)
    return chart.svg()


@rc_context(STYLE)
def distributions(rows: Mapping[str, Sequence[float]], x_title: str) -> str:
    """Every sample as a translucent stroke on a shared logarithmic axis, p50, p90, p99 marked."""
    chart = Chart(WIDTH, 0.65 + 0.4 * len(rows), x_title)
    top = np.quantile([t for times in rows.values() for t in times], 0.998, method="higher")
    for i, (name, times) in enumerate(rows.items()):
        shown = [t for t in times if t <= top]
        alpha = 0.3 if len(times) > 40 else 0.9
        chart.axes.plot(shown, [i] * len(shown), "|", ms=12, alpha=alpha, color=colour(name))
        marks: Any = ((50, "-", 2.0), (90, "-", 1.2), (99, ":", 1.2))
        for q, style, width in marks:
            value = float(np.percentile(times, q, method="inverted_cdf"))
            if value <= top:
                mark = chart.axes.vlines(
                    value, i - 0.42, i + 0.42, "black", linestyles=style, linewidth=width
                )
                chart.tip(mark, f"{name} p{q}: {milliseconds(value)}")
    chart.rows(list(rows))
    _logarithmic(chart.axes, "x", milliseconds)
    return chart.svg()


@rc_context(STYLE)
def ratios(rows: Mapping[str, Sequence[tuple[str, float]]], names: Sequence[str]) -> str:
    """A row an operation: each backend a dot at its ratio, its figure beside the outermost ones."""
    chart = Chart(WIDTH, 1.2 + 0.36 * len(rows), "speed relative to plain PyTorch")
    chart.rows(list(rows))
    chart.axes.margins(x=0.08)
    chart.axes.axvline(1, color="0.4", linewidth=1)
    for i, (title, row) in enumerate(rows.items()):
        for backend, ratio in sorted(row, key=lambda pair: -names.index(pair[0])):
            (dot,) = chart.axes.plot(
                ratio, i, "o", ms=10, mec="white", color=colour(backend), clip_on=False
            )
            chart.tip(dot, f"{title}, {backend}: {ratio:.2f} × plain PyTorch")
        low, high = min(r for _, r in row), max(r for _, r in row)
        for value, side in ((high, 1), (low, -1)):
            if side == 1 or low < 0.8 * high:
                _label(chart.axes, f"{value:.2g}", value, i, 9 * side)
        for value in (r for name, r in row if name == names[0] and 1.2 * low < r < high / 1.2):
            chart.axes.annotate(
                f"{value:.2g}", (value, i), (0, 8), textcoords="offset points", ha="center"
            )
    for name in names:
        chart.axes.plot([], [], "o", color=colour(name), label=name)
    _logarithmic(chart.axes, "x", lambda x: f"{x:g} ×")
    chart.figure.legend(loc="outside upper left", ncols=len(names), fontsize=9)
    return chart.svg()


@rc_context(STYLE)
def roofline(ceilings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Work per second against work per byte, under the ceilings of this machine."""
    chart = Chart(WIDTH, 4.6, "operations per byte", "operations per second")
    for r in records:
        place = r["flops"] / r["bytes"], r["flops"] / r["p50_ms"] * 1e3
        (dot,) = chart.axes.plot(*place, "o", mec="white", color=colour(r["backend"]))
        share = f"{r['of_floor']:.1%} of the {r['bound']} floor"
        chart.tip(dot, f"{r['group']} {r['backend']}: {share}")
    for name in dict.fromkeys(r["backend"] for r in records):
        chart.axes.plot([], [], "o", color=colour(name), label=name)
    flops, bandwidth = ceilings["flops"], ceilings["bandwidth"]
    xs = [r["flops"] / r["bytes"] for r in records]
    left, right = min(xs) / 2, 2 * max(max(flops.values()) / bandwidth[-1][1], *xs)
    caches = bandwidth[:1] if bandwidth[0][1] >= 1.2 * bandwidth[-1][1] else []
    for (size, rate), style in zip([bandwidth[-1], *caches], ("-.", "--"), strict=False):
        x = np.array([left, max(flops.values()) / rate])
        label = f"{number(rate)}B/s from {number(size)}B"
        chart.axes.plot(x, rate * x, "k", linestyle=style, linewidth=1, label=label)
    for dtype, rate in flops.items():
        chart.axes.plot([rate / bandwidth[0][1], right], [rate, rate], "k", linewidth=1)
        _label(chart.axes, f"{dtype} {number(rate)}", right, rate, 4)
    lowest = min(r["flops"] / r["p50_ms"] * 1e3 for r in records)
    chart.axes.set(xlim=(left, right), ylim=(lowest / 2, None))
    _logarithmic(chart.axes, "x")
    _logarithmic(chart.axes, "y")
    chart.figure.legend(loc="outside right center", fontsize=9)
    return chart.svg()
