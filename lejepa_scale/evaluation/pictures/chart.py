"""Line charts as SVG inside a page, in the page's own colours. Refuses values that are not finite."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34  # of the frame
_MOST_POINTS = 800  # of a line


@dataclass(frozen=True)
class Line:
    """Points in the order of x. kind: its class in the page's style, `main` or `other`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "main"


def chart(lines: Sequence[Line], *, x_label: str, logarithmic: bool = False) -> str:
    """An <svg> element. A line of one point is a dot. Raises ValueError for no points, and on a logarithmic scale for values
    that are not above 0."""
    xs, ys = [x for line in lines for x in line.x], [y for line in lines for y in line.y]
    if not xs or not all(map(math.isfinite, [*xs, *ys])) or (logarithmic and min(ys) <= 0):
        raise ValueError("a chart needs finite points, above 0 on a logarithmic scale")
    left, right = min(xs), max(xs)
    rows = log_ticks(min(ys), max(ys)) if logarithmic else ticks(min(ys), max(ys))
    scale = math.log10 if logarithmic else float
    low, high = (scale(v) for v in (min(*ys, rows[0]), max(*ys, rows[-1])))

    def at_x(x: float) -> float:
        share = (x - left) / (right - left) if right > left else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        share = (scale(y) - low) / (high - low) if high > low else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in rows:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at_y(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in ticks(left, right, whole=True) if right > left else [left]:
        if left <= x <= right:
            parts.append(
                f'<text x="{at_x(x):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(x)}</text>'
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    for line in lines:
        points = [(at_x(x), at_y(y)) for x, y in zip(line.x, line.y, strict=True)]
        title = f"<title>{html.escape(line.name)}</title>"
        if len(points) == 1:
            parts.append(
                f'<circle class="{line.kind}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="4">{title}</circle>'
            )
            continue
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in thinned(points))
        parts.append(f'<polyline class="{line.kind}" points="{drawn}">{title}</polyline>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 800 of them: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size, kept = math.ceil(2 * len(points) / _MOST_POINTS), list[tuple[float, float]]()
    for start in range(0, len(points), size):
        some = points[start : start + size]
        kept += sorted({min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])})
    return kept


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers; they reach from `low` to `high` or beyond."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from below `low` to above `high`, at most about six; with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 2:
        fine = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
        start = max([i for i, v in enumerate(fine) if v <= low], default=0)
        end = next((i for i, v in enumerate(fine) if v >= high), len(fine) - 1)
        return fine[start : max(end, start + 1) + 1]
    step = math.ceil((last - first) / 6)
    return [10.0**k for k in range(first, last + step, step)]


def _number(value: float) -> str:
    """Short: 2000 as 2k, small ones in powers of ten."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if abs(value) >= 2e3 else f"{value:.4g}"
