"""The page's drawings, as SVG text. Coordinates are in a fixed view box that the browser scales."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product

from shardwise.sharding.axes import Range

LETTER = 6.2
"""Mean width of a letter of the drawings' font."""


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    place = f'x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{height:g}"'
    return f'<rect class="{kind}" {place} rx="2">{inside}</rect>'


def text(x: float, y: float, content: str, *, anchor: str = "start", soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f'<text{kind} x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(content)}</text>'


def drawing(width: float, height: float, parts: Iterable[str], label: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal stacked bar."""

    label: str
    parts: tuple[tuple[str, float, str], ...]
    """(css class, value, tooltip), left to right."""
    note: str


def stacked_bars(bars: Sequence[Bar], full: float, label: str) -> str:
    """Bars of up to `full`, one below the other."""
    left, width, row = 64, 560, 24
    out: list[str] = []
    for i, bar in enumerate(bars):
        y, x = i * row + 4, float(left)
        out.append(text(left - 8, y + 12, bar.label, anchor="end", soft=True))
        for kind, value, title in bar.parts:
            w = width * value / full
            out.append(rect(x, y, w, 16, kind, title))
            x += w
        out.append(text(left + width + 8, y + 12, bar.note))
    return drawing(left + width + 130, len(bars) * row + 6, out, label)


@dataclass(frozen=True, slots=True)
class MapRow:
    """One tensor pattern: for each rank the parts that it holds of the dim, or the two dims, that are cut."""

    label: str
    note: str
    shares: tuple[tuple[tuple[Range, ...], tuple[Range, ...]] | None, ...]
    """Of the first and of the second. None: the whole tensor."""
    lengths: tuple[int, int]
    """Of the two, in elements or experts; 1 where there is no second."""


def holding_map(rows: Sequence[MapRow], label: str) -> str:
    """Ranks as columns; in each cell what is held lies where it lies in the tensor, a second cut dim downwards."""
    ranks = len(rows[0].shares) if rows else 0
    left, row = 270, 20
    cell = max(18.0, min(90.0, 640 / max(ranks, 1)))
    out = [text(left + (r + 0.5) * cell, 12, str(r), anchor="middle", soft=True) for r in range(ranks)]
    for i, line in enumerate(rows):
        y = 20 + i * row
        out.append(text(left - 8, y + 12, line.label, anchor="end"))
        for r, share in enumerate(line.shares):
            x, inner = left + r * cell + 1, cell - 2
            out.append(rect(x, y + 2, inner, 13, "copy" if share is None else "free", f"rank {r}: {line.note}"))
            for (start, stop), (top, bottom) in product(*share) if share else ():
                across, down = line.lengths
                held = f"rank {r}: {start} to {stop} of {across}" + (
                    f", {top} to {bottom} of {down}" if down > 1 else ""
                )
                width, height = max(inner * (stop - start) / across, 1.0), max(13 * (bottom - top) / down, 0.5)
                out.append(rect(x + inner * start / across, y + 2 + 13 * top / down, width, height, "weights", held))
    return drawing(left + ranks * cell + 10, 26 + len(rows) * row, out, label)


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float
    label: str
    kind: str


def scatter(points: Sequence[Point], x_label: str, y_label: str, label: str) -> str:
    """Points on logarithmic axes; the lower left is best."""
    left, width, height = 70, 640, 300
    xs, ys = _scale([p.x for p in points], left, left + width), _scale([p.y for p in points], height, 10)
    out = [f'<path class="axis" fill="none" d="M{left} 10 V{height} H{left + width}"/>']
    for tick in _ticks([p.x for p in points]):
        out.append(text(xs(tick), height + 18, f"{tick:g}", anchor="middle", soft=True))
    for tick in _ticks([p.y for p in points]):
        out.append(text(left - 8, ys(tick) + 4, f"{tick:g}", anchor="end", soft=True))
    for p in points:
        title = f"<title>{escape(p.label)}</title>"
        out.append(f'<circle class="{p.kind}" cx="{xs(p.x):.1f}" cy="{ys(p.y):.1f}" r="5">{title}</circle>')
    for p in _spread(points, xs, ys):
        out.append(text(xs(p.x) + 9, ys(p.y) + 4, p.label))
    out.append(text(left + width, height + 36, x_label, anchor="end", soft=True))
    out.append(text(left + 8, 20, y_label, soft=True))
    right = max(left + width, *(xs(p.x) + _width(p) for p in points))
    return drawing(right + 20, height + 42, out, label)


def _spread(points: Sequence[Point], xs, ys) -> list[Point]:
    """Points whose labels do not run into one that is already placed, in order."""
    placed: list[Point] = []
    for p in points:
        if all(abs(ys(p.y) - ys(q.y)) > 13 or _apart(xs(p.x), p, xs(q.x), q) for q in placed):
            placed.append(p)
    return placed


def _apart(x: float, p: Point, y: float, q: Point) -> bool:
    """Whether two labels on one line leave each other room."""
    return x > y + _width(q) + 10 or y > x + _width(p) + 10


def _width(p: Point) -> float:
    return LETTER * len(p.label)


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max((high - low) * 0.06, 0.05)
    return low - margin, high + margin


def _scale(values: Sequence[float], start: float, stop: float):
    low, high = _bounds(values)
    return lambda v: start + (math.log10(v) - low) / (high - low) * (stop - start)


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = _bounds(values)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    return [t for t in ticks if low <= math.log10(t) <= high]
