"""Charts of the page: matplotlib's SVG, dark on white."""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
from fusion_model.benchmarks.suite.cases import WAYS
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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


def colour(name: str) -> str:
    """Of a backend, whatever follows its slash."""
    return WAYS[name.partition("/")[0]][1]


def axes_of(width: float, height: float, x_title: str, y_title: str = "") -> tuple[Figure, Axes]:
    """A figure of so many inches, and its one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes = figure.subplots()
    axes.set(xlabel=x_title, ylabel=y_title)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as a file of its own, without ids, which a page must not have twice."""
    file = StringIO()
    figure.savefig(file, format="svg", metadata=NO_DATE)
    return re.sub(r'<g id="[^"]*">', "<g>", file.getvalue())


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


def _label(axes: Axes, text: str, x: float, y: float, offset: tuple[float, float]) -> None:
    """Text so many points (right, up) from a place: beside it, or above it."""
    side = "center" if offset[0] == 0 else "left" if offset[0] > 0 else "right"
    height = "baseline" if offset[1] else "center"
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha=side, va=height)


@rc_context(STYLE)
def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str) -> str:
    """Lines over a logarithmic plane; the legend in the order in which they end."""
    figure, axes = axes_of(5.4, 2.7, x_title, y_title)
    drawn: list[str] = []
    for name, line in sorted(series.items(), key=lambda item: -item[1][-1][1]):
        style = STYLES[drawn.count(colour(name)) % len(STYLES)] + "o"
        drawn.append(colour(name))
        axes.plot(*zip(*line, strict=True), style, color=colour(name), markersize=4, label=name)
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    axes.set_xticks(sorted({x for line in series.values() for x, _ in line}), minor=False)
    axes.minorticks_off()
    figure.legend(loc="outside right center", fontsize=9)
    return _svg(figure)


@rc_context(STYLE)
def ratios(rows: Mapping[str, Sequence[tuple[str, float]]], names: Sequence[str]) -> str:
    """A row an operation, the first on top: each backend a dot at its ratio, its figure beside the
    outermost ones."""
    figure, axes = axes_of(9.5, 1.2 + 0.36 * len(rows), "speed relative to plain PyTorch")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.axvline(1, color="0.4", linewidth=1)
    for i, row in enumerate(rows.values()):
        for backend, ratio in sorted(row, key=lambda pair: -names.index(pair[0])):
            axes.plot(ratio, i, "o", ms=10, mec="white", color=colour(backend), clip_on=False)
        low, high = min(r for _, r in row), max(r for _, r in row)
        for value, side in ((high, 1), (low, -1)):
            if side == 1 or low < 0.8 * high:
                _label(axes, f"{value:.2g}", value, i, (9 * side, 0))
        for value in (r for name, r in row if name == names[0] and 1.2 * low < r < high / 1.2):
            _label(axes, f"{value:.2g}", value, i, (0, 8))
    for name in names:
        axes.plot([], [], "o", color=colour(name), label=name)
    _logarithmic(axes, "x", lambda x: f"{x:g} ×")
    figure.legend(loc="outside upper left", ncols=len(names), fontsize=9)
    return _svg(figure)
