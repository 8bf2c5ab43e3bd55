"""Charts as inline SVG: colours come from the page's CSS, so light, dark and print all work.

Every mark has a `<title>`, which browsers show when pointed at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 950


def colour(backend: str) -> str:
    """CSS class of a backend."""
    return "k-" + backend.replace(".", "-")


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


def _svg(height: float, parts: Sequence[str], label: str, width: int = WIDTH) -> str:
    body = "".join(parts)
    box = f'viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(label)}"'
    return f"<svg {box}>{body}</svg>"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )


@dataclass(frozen=True)
class Bar:
    """A backend's bar: its length, what stands at its end, and what pointing at it tells."""

    name: str
    value: float
    label: str
    tip: str
    whisker: float | None = None


def bars(rows: Sequence[Bar], label: str) -> str:
    """Horizontal bars from zero; a thin line goes on to each whisker."""
    left, right, pitch = 170, 170, 27
    most = max(max(r.value, r.whisker or 0) for r in rows) or 1.0
    shown = min(most, 2.2 * max(r.value for r in rows))  # one wild p99 must not flatten the rest
    scale = (WIDTH - left - right) / shown
    parts = []
    for i, row in enumerate(rows):
        y, end = i * pitch + 4, left + row.value * scale
        parts.append(_text(left - 10, y + 13, row.name, "name", "end"))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{max(end - left, 1):.1f}" height="18" rx="2" '
            f'class="{colour(row.name)} fill"><title>{escape(row.tip)}</title></rect>'
        )
        reach = end
        if row.whisker is not None and row.whisker > row.value:
            reach = left + min(row.whisker, shown) * scale
            parts.append(
                f'<path d="M{end:.1f} {y + 9}H{reach:.1f}M{reach:.1f} {y + 5}v8" '
                f'class="{colour(row.name)} line"/>'
            )
        parts.append(_text(reach + 8, y + 13, row.label, "value"))
    return _svg(len(rows) * pitch + 4, parts, label)


class Axis:
    """A logarithmic axis from data to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, pad: float = 0.06):
        low, high = math.log10(min(values)), math.log10(max(values))
        spread = max(high - low, 0.3)
        self.low, self.high = low - pad * spread, high + pad * spread
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 between where there are few."""
        spread = self.high - self.low
        digits = (1, 1.5, 2, 3, 4, 6, 8) if spread < 0.8 else (1, 2, 5) if spread < 2.2 else (1,)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [d * 10.0**p for p in powers for d in digits]
        return [x for x in found if self.low <= math.log10(x) <= self.high]


def _frame(x: Axis, y: Axis, xs: Sequence[float], x_title: str, y_title: str) -> list[str]:
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<path d="M{x.start:.1f} {at:.1f}H{x.end:.1f}" class="grid"/>')
        parts.append(_text(x.start - 8, at + 4, number(tick), "tick", "end"))
    for tick in xs:
        parts.append(f'<path d="M{x(tick):.1f} {y.start:.1f}v5" class="axis"/>')
        parts.append(_text(x(tick), y.start + 18, number(tick), "tick", "middle"))
    parts.append(f'<path d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}" class="axis"/>')
    parts.append(_text((x.start + x.end) / 2, y.start + 36, x_title, "tick", "middle"))
    parts.append(_text(4, 12, y_title, "tick"))
    return parts


def _spread(ends: list[tuple[float, str]], gap: float, low: float, high: float) -> dict[str, float]:
    """Heights of labels at the ends of lines, moved apart where they would overlap."""
    ordered = sorted(ends)
    placed: list[float] = []
    for at, _ in ordered:
        placed.append(max(at, placed[-1] + gap) if placed else max(at, low))
    overflow = placed[-1] - high
    if overflow > 0:
        placed[-1] -= overflow
        for i in reversed(range(len(placed) - 1)):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    return {name: y for (_, name), y in zip(ordered, placed, strict=True)}


def curves(series: dict[str, list[tuple[float, float]]], x_title: str, y_title: str) -> str:
    """Lines over a logarithmic plane, each named at its right end."""
    height, width = 250, 470
    points = [point for line in series.values() for point in line]
    x = Axis([p[0] for p in points], 56, width - 120)
    y = Axis([p[1] for p in points], height - 44, 22)
    xs = sorted({p[0] for p in points})
    xs = [v for i, v in enumerate(xs) if i == 0 or x(v) - x(xs[i - 1]) > 20]
    parts = _frame(x, y, xs, x_title, y_title)
    ends = _spread([(y(line[-1][1]), n) for n, line in series.items()], 15, 22, height - 40)
    for name, line in series.items():
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
        parts.append(f'<path d="M{path}" class="{colour(name)} line"/>')
        for a, b in line:
            tip = escape(f"{name}, {x_title} {number(a)}: {number(b)} {y_title}")
            parts.append(
                f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.4" class="{colour(name)} fill dot">'
                f"<title>{tip}</title></circle>"
            )
        last = line[-1]
        parts.append(
            f'<path d="M{x(last[0]) + 5:.1f} {y(last[1]):.1f}L{x.end + 10:.1f} {ends[name]:.1f}" '
            f'class="{colour(name)} leader"/>'
        )
        parts.append(_text(x.end + 14, ends[name] + 4, name, f"{colour(name)} label"))
    return _svg(height, parts, f"{y_title} against {x_title}", width)


def distributions(rows: dict[str, Sequence[float]], label: str) -> str:
    """Every sample as a translucent tick on a shared logarithmic axis, p50, p90, p99 marked."""
    left, pitch = 170, 40
    everything = sorted(t for times in rows.values() for t in times)
    top = everything[min(len(everything) - 1, int(0.998 * len(everything)))]
    x = Axis([everything[0], top], left, WIDTH - 20)
    height = len(rows) * pitch + 30
    parts = []
    for tick in x.ticks():
        parts.append(f'<path d="M{x(tick):.1f} 0V{height - 26}" class="grid"/>')
        parts.append(_text(x(tick), height - 10, milliseconds(tick), "tick", "middle"))
    for i, (name, times) in enumerate(rows.items()):
        y, ordered = i * pitch + 2, sorted(times)
        parts.append(_text(left - 10, y + 18, name, "name", "end"))
        dense = "sample" if len(ordered) > 40 else "sample few"
        strokes = "".join(f"M{x(t):.1f} {y + 8}v16" for t in ordered if t <= top)
        parts.append(f'<path d="{strokes}" class="{colour(name)} {dense}"/>')
        for q, reach in ((50, 14), (90, 10), (99, 10)):
            value = ordered[min(len(ordered) - 1, math.ceil(q / 100 * len(ordered)) - 1)]
            if value <= top:
                tip = f"{name} p{q}: {milliseconds(value)}"
                parts.append(
                    f'<path d="M{x(value):.1f} {y + 16 - reach}v{2 * reach}" '
                    f'class="mark m{q}"><title>{escape(tip)}</title></path>'
                )
    return _svg(height, parts, label)


def ratios(rows: dict[str, list[tuple[str, float]]], names: Sequence[str], label: str) -> str:
    """A row an operation: each backend a dot at its ratio, its figure beside the outermost ones."""
    left, right, pitch, top = 190, 70, 36, 46
    x = Axis([v for row in rows.values() for _, v in row] + [1.0], left + 20, WIDTH - right)
    height = top + len(rows) * pitch + 26
    bottom = height - 26
    parts = []
    at = float(left)
    for name in names:
        parts.append(f'<circle cx="{at:.1f}" cy="10" r="6" class="{colour(name)} fill"/>')
        parts.append(_text(at + 11, 15, name, "name"))
        at += 32 + 7.4 * len(name)
    for tick in x.ticks():
        kind = "axis" if tick == 1 else "grid"
        parts.append(f'<path d="M{x(tick):.1f} {top - 10}V{bottom}" class="{kind}"/>')
        parts.append(_text(x(tick), bottom + 19, f"{tick:g} ×", "tick", "middle"))
    for i, (title, row) in enumerate(rows.items()):
        y = top + i * pitch + 12
        parts.append(_text(left - 14, y + 5, title, "name", "end"))
        parts.append(f'<path d="M{left} {y}H{WIDTH - right + 10}" class="grid"/>')
        for backend, ratio in sorted(row, key=lambda pair: names.index(pair[0]), reverse=True):
            tip = escape(f"{title}, {backend}: {ratio:.2f} × plain PyTorch")
            parts.append(
                f'<circle cx="{x(ratio):.1f}" cy="{y}" r="7" class="{colour(backend)} fill dot">'
                f"<title>{tip}</title></circle>"
            )
        values = [ratio for _, ratio in row]
        parts.append(_text(x(max(values)) + 12, y + 5, f"{max(values):.2g}", "value"))
        if min(values) < 0.8 * max(values):
            parts.append(_text(x(min(values)) - 12, y + 5, f"{min(values):.2g}", "value", "end"))
    return _svg(height, parts, label)


@dataclass(frozen=True)
class Point:
    """On the roofline."""

    name: str
    intensity: float
    flops: float
    tip: str


def roofline(
    points: Sequence[Point], flops: dict[str, float], bandwidth: Sequence[tuple[str, float]]
) -> str:
    """Work per second against work per byte, under the ceilings of this machine."""
    height = 380
    xs = [p.intensity for p in points]
    xs += [min(xs) / 2, max(max(flops.values()) / bandwidth[-1][1], max(xs)) * 2]
    x = Axis(xs, 60, WIDTH - 150)
    y = Axis([*(p.flops for p in points), 1.3 * max(flops.values())], height - 44, 22)
    parts = _frame(x, y, x.ticks(), "operations per byte", "operations per second")
    left, right = 10**x.low, 10**x.high
    for name, rate in bandwidth:
        start = max(left, 10**y.low / rate)
        end = min(right, max(flops.values()) / rate)
        parts.append(
            f'<path d="M{x(start):.1f} {y(start * rate):.1f}L{x(end):.1f} {y(end * rate):.1f}" '
            f'class="roof"><title>{escape(name)}: {number(rate)}B/s</title></path>'
        )
        above = rate == max(r for _, r in bandwidth)
        share = 0.5 if above else 0.25  # where nothing is measured
        middle = start ** (1 - share) * end**share
        dx, dy, anchor = (-6, -6, "end") if above else (10, 14, "start")
        parts.append(_text(x(middle) + dx, y(middle * rate) + dy, name, "tick", anchor))
    for dtype, rate in flops.items():
        begin = max(left, rate / max(r for _, r in bandwidth))
        parts.append(f'<path d="M{x(begin):.1f} {y(rate):.1f}H{x.end:.1f}" class="roof"/>')
        parts.append(_text(x.end + 8, y(rate) + 4, f"{dtype} {number(rate)}", "tick"))
    for p in points:
        parts.append(
            f'<circle cx="{x(p.intensity):.1f}" cy="{y(p.flops):.1f}" r="4.5" '
            f'class="{colour(p.name)} fill dot"><title>{escape(p.tip)}</title></circle>'
        )
    return _svg(height, parts, "roofline")


def legend(names: Sequence[str]) -> str:
    """Names with their colours."""
    items = "".join(f'<li><i class="{colour(n)}"></i>{escape(n)}</li>' for n in names)
    return f'<ul class="legend">{items}</ul>'
