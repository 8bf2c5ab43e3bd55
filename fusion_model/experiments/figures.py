"""Figures that a paper could print: one column wide, readable in grey, no title inside."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion_model.experiments.arms import COUNTED, FUSED, STATIC, UNFUSED
from fusion_model.experiments.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart by the colour-blind, too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = "osD^vP<>X*hd"
# Which look alike in all figures of curves.
USUAL = (UNFUSED, STATIC, FUSED, *(arm.name for arm in COUNTED))
STYLES = ("-", "--", "-.", ":")
FONT: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def _figure(width: float, height: float, panels: int = 1) -> tuple["Figure", list["Axes"]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(FONT):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False, sharex=True, sharey=True)[0]
    for a in axes:
        a.tick_params(labelsize=8)
    return figure, list(axes)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float | Estimate]]],
    xlabel: str,
    ylabel: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
) -> "Figure":
    """A line an arm, through (x, y), with an interval where y has one; else x is of whole numbers.

    No lines make an empty figure.
    """
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    figure, (axes,) = _figure(6.0, 3.4)
    taken = {name: USUAL.index(name) for name in lines if name in USUAL}
    free = (i for i in count() if i not in taken.values())
    for name, points in lines.items():
        i = taken[name] if name in taken else next(free)
        x = [x for x, _ in points]
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": STYLES[i // len(COLOURS) % len(STYLES)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.2,
            "label": name,
        }
        if plain := [y for _, y in points if not isinstance(y, Estimate)]:
            axes.plot(x, plain, **style)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            continue
        found = [y for _, y in points if isinstance(y, Estimate)]
        bounds = np.array([(e.value - e.low, e.high - e.value) for e in found])
        y = [e.value for e in found]
        axes.errorbar(x, y, yerr=np.nan_to_num(bounds.T), capsize=2, **style)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    if zero:
        axes.axhline(0, color="grey", linewidth=0.8)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    if log_x:
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.6)
    if lines:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def intervals(
    panels: Mapping[str, Mapping[str, Sequence[Estimate]]],
    xlabel: str,
    series: Sequence[str] = ("",),
) -> "Figure":
    """A row a label with a dot and its interval, 0 marked; panels side by side share the labels.

    Args:
        panels: title -> label -> one estimate a series.
        series: names of the series, shown in a legend when there are several.
    """
    labels = list(next(iter(panels.values())))
    height = 0.9 + 0.2 * len(labels) * max(1.0, 0.7 * len(series))
    figure, axes = _figure(1.9 + 2.4 * len(panels), height, len(panels))
    for a, (title, rows) in zip(axes, panels.items(), strict=True):
        for s, name in enumerate(series):
            offset = (s - (len(series) - 1) / 2) * 0.24
            y = np.arange(len(labels)) + offset
            found = [rows[label][s] for label in labels]
            value, low, high = np.array([(e.value, e.low, e.high) for e in found]).T
            a.errorbar(
                value,
                y,
                xerr=np.maximum(np.nan_to_num([value - low, high - value]), 0),
                fmt=MARKERS[s],
                color=COLOURS[s],
                markersize=4,
                capsize=2,
                linewidth=1.1,
                label=name,
            )
        a.axvline(0, color="grey", linewidth=0.8)
        a.set_yticks(range(len(labels)), labels, fontsize=8)
        a.set_title(title, fontsize=8.5)
        a.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel(xlabel, fontsize=9)
    if len(series) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside upper center", ncols=len(series), fontsize=8, frameon=False
        )
    return figure
