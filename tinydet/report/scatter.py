"""A scatter plot of named points, such as accuracy over latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydet.atomic import replacing
from tinydet.report.fonts import drawable, font_families

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOG_FROM = 10.0  # largest x over smallest from which a logarithmic axis shows more
_GAP = 8.0  # pixels between names


@dataclass(frozen=True)
class Point:
    """A named point.

    Attributes:
        name: written beside it.
        x: position, in the plot's units.
        y: position, in the plot's units.
        group: points of one group have a colour, told in the legend if there is more than one.
        spread: half the length of a bar along y; 0 draws none.
        x_bar: where a bar along x begins and ends; None draws none.
        y_bar: the same along y.
    """

    name: str
    x: float
    y: float
    group: str = ""
    spread: float = 0.0
    x_bar: tuple[float, float] | None = None
    y_bar: tuple[float, float] | None = None


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats: none is as far left and as high, and better in one.

    Returns:
        From left to right; of equal points all.
    """
    return sorted(
        (p for p in points if not any(_beats(other, p) for other in points)),
        key=lambda point: point.x,
    )


def _beats(one: Point, other: Point) -> bool:
    no_worse = one.x <= other.x and one.y >= other.y
    return no_worse and (one.x, one.y) != (other.x, other.y)


def draw_scatter(
    points: Sequence[Point], x_label: str, y_label: str, title: str = "", front: bool = False
) -> Figure:
    """Return a figure with one mark and one name for each point.

    The x axis is logarithmic when the positions are positive and span a decade.

    Args:
        points: at least one.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        title: above the plot.
        front: join the points of `pareto_front` by steps.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("no points to plot: give at least one")
    import matplotlib as mpl

    points = [replace(p, name=drawable(p.name), group=drawable(p.group)) for p in points]
    labels = {
        name: "\n".join(map(drawable, text.split("\n")))
        for name, text in (("xlabel", x_label), ("ylabel", y_label), ("title", title))
    }
    texts = [text for p in points for text in (p.name, p.group)]
    with mpl.rc_context({"font.family": font_families([*texts, *labels.values()])}):
        return _draw(points, labels, front)


def _draw(points: Sequence[Point], labels: dict[str, str], front: bool) -> Figure:
    from matplotlib.figure import Figure

    # Not pyplot: it would keep the figure, and choose a window system.
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(point.group for point in points))
    for group in groups:
        members = [point for point in points if point.group == group]
        axes.scatter([p.x for p in members], [p.y for p in members], label=group, zorder=2)
    for p in points:
        if p.spread:
            axes.errorbar(p.x, p.y, p.spread, fmt="none", ecolor="gray", elinewidth=1, capsize=3)
        _draw_bars(axes, p)
    if front:
        best = pareto_front(points)
        axes.step(
            *([p.x for p in best], [p.y for p in best]),
            where="post",
            color="gray",
            linestyle="--",
            linewidth=1,
            zorder=1,
            label="Pareto front",
        )
    xs = [point.x for point in points]
    if min(xs) > 0 and max(xs) / min(xs) >= _LOG_FROM:
        axes.set_xscale("log")
    axes.margins(0.12)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    if len(groups) > 1:
        axes.legend(fontsize=8, framealpha=0.8)
    _write_names(figure, axes, points)
    return figure


def _draw_bars(axes: Any, point: Point) -> None:
    for name, bar, at in (("xerr", point.x_bar, point.x), ("yerr", point.y_bar, point.y)):
        if bar is not None:
            error = [[max(0.0, at - bar[0])], [max(0.0, bar[1] - at)]]
            axes.errorbar(
                *(point.x, point.y),
                **{name: error},
                fmt="none",
                ecolor="gray",
                elinewidth=1,
                capsize=3,
                zorder=1,
            )


def _write_names(figure: Figure, axes: Any, points: Sequence[Point]) -> None:
    """Write each name beside its point, towards the middle, and no name over another."""
    figure.draw_without_rendering()
    left, right = axes.get_xlim()
    middle = axes.transData.transform([(left, 0), (right, 0)])[:, 0].mean()
    taken: list[Any] = []
    for point in sorted(points, key=lambda point: -point.y):
        x, _ = axes.transData.transform((point.x, point.y))
        side = "left" if x < middle else "right"
        name = axes.annotate(
            point.name,
            (point.x, point.y),
            # Above the bar, if there is one.
            xytext=(7 if side == "left" else -7, 8 if point.x_bar else 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )
        box = name.get_window_extent()
        for other in sorted(taken, key=lambda other: -other.y1):
            if box.padded(_GAP).overlaps(other):
                down = box.y1 - other.y0 + _GAP
                offset = name.xyann
                name.xyann = (offset[0], offset[1] - down * 72 / figure.dpi)
                box = box.translated(0, -down)
        taken.append(box)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically; the file name's ending (.png, .svg, .pdf) says the format.

    Args:
        figure: what to write.
        path: the file; its folder is made.

    Raises:
        ValueError: matplotlib has no format of this ending.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{path}: not the name of a picture; end it in .png, .svg or .pdf")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind)
