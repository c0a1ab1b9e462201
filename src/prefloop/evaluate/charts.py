"""Small charts as inline SVG. Colours come from the page's CSS classes, so they follow its light or dark
theme.

A chart is 340 × 190 units, about the width of a phone, so that its 11-unit labels stay readable when it is
scaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 12.0, 24.0
MOST_POINTS = 150
"""Points of a line; a longer line is drawn as means of neighbours."""

_TICKS = 4
_MOST_LABELS = 9


@dataclass(frozen=True, slots=True)
class Point:
    """One value, with its interval where there is one.

    `note` is shown when the pointer rests on it, `tag` stands above it.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart. `tone` is the CSS class of its colour: `a`, `b` or `quiet`."""

    name: str
    points: tuple[Point, ...]
    tone: str = "a"


def line_chart(
    lines: Sequence[Line],
    label: str,
    *,
    ticks: Sequence[tuple[float, str]] = (),
    rules: Sequence[float] = (),
    reference: float | None = None,
) -> Markup:
    """Return lines over a common axis.

    Args:
        lines: each with points in order of x; values that are not finite are left out.
        label: what a screen reader says.
        ticks: positions and labels of the x axis; by default round numbers.
        rules: x positions of upright hairlines: where one round ends and the next begins.
        reference: y position of a dashed line: the value that means "no difference".

    """
    lines = [Line(line.name, tuple(p for p in line.points if isfinite(p.y)), line.tone) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return Markup('<p class="empty">nothing to draw yet</p>')
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None and isfinite(v)]
    y = _Axis.over([*heights, *([] if reference is None else [reference])], HEIGHT - BOTTOM, TOP)
    across = [p.x for p in points] + [position for position, _ in ticks]
    x = _Axis(min(across), max(across), LEFT + 8, WIDTH - RIGHT - 8)
    body = [_grid(y), _labels(x, ticks or [(v, _short(v)) for v in x.ticks() if v == int(v)])]
    body += [_upright(x(position)) for position in rules]
    if reference is not None:
        body.append(_level(y(reference), "reference"))
    body += [_line(line, x, y) for line in lines]
    return _svg(body, label)


def histogram(
    shares: Sequence[float], behind: Sequence[float], edges: Sequence[float], label: str, top: float
) -> Markup:
    """Return bars of `shares`, with the outline of `behind` over the same bins.

    Args:
        shares: share of each bin, 0–1.
        behind: what to compare with; empty for nothing.
        edges: one more than bins.
        label: what a screen reader says.
        top: share at the top of the chart, the same for all charts that are compared.

    """
    y = _Axis(0.0, 100 * top or 100.0, HEIGHT - BOTTOM, TOP)
    x = _Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    body = [_grid(y, " %"), _labels(x, [(v, _short(v)) for v in x.ticks()])]
    for share, (low, high) in zip(shares, pairwise(edges), strict=True):
        left, width, height = x(low), x(high) - x(low), y(0) - y(100 * share)
        if share:
            title = f"{_short(low)} to {_short(high)}: {100 * share:.1f} %"
            body.append(
                f'<rect class="a" x="{left + 0.5:.1f}" y="{y(100 * share):.1f}" width="{max(width - 1, 0.5):.1f}" '
                f'height="{height:.1f}"><title>{escape(title)}</title></rect>'
            )
    if behind:
        bins = zip(behind, pairwise(edges), strict=True)
        steps = [f"{x(edge):.1f},{y(100 * share):.1f}" for share, ends in bins for edge in ends]
        body.append(f'<polyline class="outline" points="{" ".join(steps)}"/>')
    return _svg(body, label)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """Return at most `most` points: means of neighbours where there are more. Intervals and notes are dropped then."""
    finite = [p for p in points if isfinite(p.y)]
    if len(finite) <= most:
        return tuple(finite)
    ends = [round(i * len(finite) / most) for i in range(most + 1)]
    buckets = [finite[a:b] for a, b in pairwise(ends)]
    return tuple(Point(sum(p.x for p in b) / len(b), sum(p.y for p in b) / len(b)) for b in buckets)


def round_numbers(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Return about `count` round numbers from `low` to `high`, both inside.

    Example:
        >>> round_numbers(0.0, 2.0)
        [0.0, 0.5, 1.0, 1.5, 2.0]

    """
    raw = (high - low) / count
    scale = 10.0 ** floor(log10(raw))
    step = next(f * scale for f in (1, 2, 2.5, 5, 10) if f * scale >= raw * 0.75)
    return [n * step for n in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class _Axis:
    """A linear map from values to units of the drawing."""

    low: float
    high: float
    first: float
    last: float

    @classmethod
    def over(cls, values: Sequence[float], first: float, last: float) -> "_Axis":
        """Cover `values` with a little room on both sides."""
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
        return cls(low - room if low < 0 or low - room > 0 else 0.0, high + room, first, last)

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        return round_numbers(self.low, self.high) if self.high > self.low else [self.low]


def _svg(body: Sequence[str], label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _same_decimals(values: Sequence[float]) -> list[str]:
    """Return all values with as many decimals as the one that needs most: 0.50 above 0.25."""
    decimals = max(len(f"{v:.6g}".partition(".")[2]) for v in values)
    return [f"{v:.{decimals}f}".replace("-", "−") for v in values] if decimals < 6 else [_short(v) for v in values]


def _grid(y: _Axis, unit: str = "") -> str:
    ticks = y.ticks()
    return "".join(
        f'{_level(y(v), "grid")}<text class="y" x="{LEFT - 6:g}" y="{y(v) + 3.5:.1f}">{text}{unit}</text>'
        for v, text in zip(ticks, _same_decimals(ticks), strict=True)
    )


def _level(at: float, name: str) -> str:
    return f'<line class="{name}" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _upright(at: float) -> str:
    return f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}"/>'


def _labels(x: _Axis, ticks: Sequence[tuple[float, str]]) -> str:
    every = ceil(len(ticks) / _MOST_LABELS)
    return "".join(
        f'<text class="x" x="{x(position):.1f}" y="{HEIGHT - 8:g}">{escape(text)}</text>'
        for position, text in ticks[::every]
    )


def _line(line: Line, x: _Axis, y: _Axis) -> str:
    path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in line.points)
    drawn = [f'<polyline points="{path}"/>']
    for p in line.points:
        if p.low is not None and p.high is not None and isfinite(p.low) and isfinite(p.high):
            drawn.append(f'<line x1="{x(p.x):.1f}" x2="{x(p.x):.1f}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>')
        if p.note or len(line.points) == 1:
            dot = f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="3"><title>{escape(p.note)}</title></circle>'
            drawn.append(dot)
        if p.tag:
            drawn.append(f'<text class="x" x="{x(p.x):.1f}" y="{y(p.y) - 7:.1f}">{escape(p.tag)}</text>')
    return f'<g class="{line.tone}">{"".join(drawn)}</g>'
