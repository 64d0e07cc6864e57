"""Line charts as SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinydet.report.html import Markup, clip, element

_MOST_POINTS = 240  # a curve; more could not be seen
_DOTS_BELOW = 30  # points of a curve that are marked one by one
PATTERNS = 6  # that the style sheet tells apart


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: for the legend.
        x: positions, ascending.
        y: values, as many.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with its unit.
        low: where it begins; None is where the values do.
        high: where it ends; None is where the values do.
    """

    label: str
    low: float | None = None
    high: float | None = None


def line_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    description: str,
    size: tuple[int, int] = (360, 230),
    filled: bool = False,
) -> Markup:
    """Return a chart that scales with its place.

    Args:
        series: curves; the style sheet tells the first `PATTERNS` apart.
        x: the horizontal axis.
        y: the vertical axis.
        description: what a reader who cannot see the chart is told.
        size: width and height in units of the chart; letters have 13.
        filled: shade the area below the curves.
    """
    width, height = size
    left, right, top, bottom = 44.0, width - 14.0, 32.0, height - 42.0
    x_ticks = _ticks([v for s in series for v in s.x], x, max(2, width // 90))
    y_ticks = _ticks([v for s in series for v in s.y], y, 4)

    def place_x(value: float) -> float:
        return left + _share(value, x_ticks) * (right - left)

    def place_y(value: float) -> float:
        return bottom - _share(value, y_ticks) * (bottom - top)

    parts = []
    for tick in y_ticks:
        at = place_y(tick)
        grid = "axis" if tick == y_ticks[0] else "grid"
        parts.append(_line(left, at, right, at, grid))
        parts.append(_text(left - 6, at + 4, _number(tick), "end"))
    for tick in x_ticks:
        at = place_x(tick)
        parts.append(_line(at, bottom, at, bottom + 4, "axis"))
        parts.append(_text(at, bottom + 18, _number(tick), "middle"))
    parts.append(_text(2, 12, y.label, "start", "label"))
    parts.append(_text(right, height - 5, x.label, "end", "label"))
    for i, curve in enumerate(series):
        points = [(place_x(a), place_y(b)) for a, b in _thinned(curve)]
        if not points:
            continue
        track = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        if filled:
            area = f"M{points[0][0]:.1f} {bottom:.1f}L{track}L{points[-1][0]:.1f} {bottom:.1f}Z"
            parts.append(element("path", class_=f"area s{i % PATTERNS}", d=area))
        parts.append(element("path", class_=f"curve s{i % PATTERNS}", d=f"M{track}"))
        if len(points) < _DOTS_BELOW:
            parts += [
                element("circle", class_=f"dot s{i % PATTERNS}", cx=f"{a:.1f}", cy=f"{b:.1f}", r=3)
                for a, b in points
            ]
    return element(
        "svg",
        element("title", clip(description, 500)),
        *parts,
        class_="chart",
        viewBox=f"0 0 {width} {height}",
        role="img",
    )


def swatch(number: int) -> Markup:
    """Return a short piece of the line of curve `number`, for a legend."""
    line = element("path", class_=f"curve s{number % PATTERNS}", d="M1 5L27 5")
    return element("svg", line, class_="swatch", viewBox="0 0 28 10", aria_hidden="true")


def _thinned(curve: Series) -> list[tuple[float, float]]:
    """Return the curve's points; of many, the means of equally long pieces."""
    points = list(zip(curve.x, curve.y, strict=True))
    piece = -(-len(points) // _MOST_POINTS)
    pieces = [points[i : i + piece] for i in range(0, len(points), piece or 1)]
    return [
        (math.fsum(a for a, _ in p) / len(p), math.fsum(b / len(p) for _, b in p)) for p in pieces
    ]


def _ticks(values: Sequence[float], axis: Axis, about: int) -> list[float]:
    """Return round numbers that cover the values, or the axis's own ends."""
    low = axis.low if axis.low is not None else min(values, default=0.0)
    high = axis.high if axis.high is not None else max(values, default=1.0)
    # Numbers that no run has would leave the range of floats.
    low, high = max(-1e100, min(low, 1e100)), max(-1e100, min(high, 1e100))
    size = max(abs(low), abs(high))
    if size < 1e-100:
        low, high = 0.0, 1.0
    elif high - low <= 1e-9 * size:  # values that are all the same are seen beside zero
        low, high = min(low, high, 0.0), max(low, high, 0.0)
    step = _round_up((high - low) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _round_up(step: float) -> float:
    """Return the next of 1, 2, 2.5, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * n for n in (1, 2, 2.5, 5, 10, 20) if power * n >= step * (1 - 1e-9))


def _share(value: float, ticks: Sequence[float]) -> float:
    return max(0.0, min(1.0, (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1.0)))


def _number(value: float) -> str:
    if 1000 <= abs(value) < 1e6:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.01:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    return element("line", class_=kind, **ends)


def _text(x: float, y: float, content: str, anchor: str, kind: str = "tick") -> Markup:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor}
    return element("text", content, class_=kind, **place)
