"""Figures drawn with matplotlib: curves of logs, and scatter plots of named points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydet.atomic import replacing
from tinydet.report.fonts import drawable, font_families
from tinydet.report.run_folder import LogRecords

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (jfly.uni-koeln.de/color), which color-blind readers can tell apart;
# the line style changes as well.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PATTERNS = ("-", "--", "-.", ":")
_WINDOWLESS = ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template")  # matplotlib backends
_UNITS = {"lr": "learning rate", "images_per_second": "speed (img/s)"}
_LOG_FROM = 10.0  # ratio of the largest x to the smallest from which the axis is logarithmic
_GAP = 8.0  # pixels between names


def draw_curves(
    figure: Figure,
    logs: Sequence[LogRecords],
    legend: Sequence[str],
    keys: Sequence[str],
    title: str = "",
) -> None:
    """Draw one panel for each key, with one curve for each log, over the training step.

    Args:
        figure: an empty figure.
        logs: at least one.
        legend: names of the curves: one for each log, or one for each log and key (all keys of the
            first log, then those of the second, ...).
        keys: what to draw, such as "loss" or "AP50"; average precisions are drawn in percent.
        title: above the panels.

    Raises:
        ValueError: no log has one of the keys, or the legend has the wrong number of names.
    """
    if len(legend) not in (len(logs), len(logs) * len(keys)):
        raise ValueError(
            f"--legend has {len(legend)} names for {len(logs)} logs and {len(keys)} keys: give one "
            "for each log, or one for each log and key"
        )
    panels = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    for row, (axes, key) in enumerate(zip(panels, keys, strict=True)):
        for i, log in enumerate(logs):
            steps, values = log.series(key)
            name = legend[i] if len(legend) == len(logs) else legend[i * len(keys) + row]
            if key.startswith("AP"):
                values = [100 * value for value in values]
            axes.plot(
                steps,
                values,
                color=_COLORS[i % len(_COLORS)],
                linestyle=_PATTERNS[i % len(_PATTERNS)],
                marker="o" if len(steps) < 30 else "",
                markersize=4,
                label=_plain(name),
            )
        if not any(line.get_xdata().size for line in axes.lines):
            known = dict.fromkeys(key for log in logs for key in log.keys())  # noqa: SIM118
            raise ValueError(f"--keys {key}: not in any log; they have {', '.join(known)}")
        axes.set_ylabel(_plain(f"{key} (%)" if key.startswith("AP") else _UNITS.get(key, key)))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if (row == 0 and len(logs) > 1) or len(legend) > len(logs):
            axes.legend(frameon=False)
    panels[-1].set_xlabel("step")
    figure.suptitle(_plain(title))


def plot_curves(
    logs: Sequence[LogRecords],
    legend: Sequence[str],
    keys: Sequence[str],
    title: str = "",
    backend: str | None = None,
    style: str = "default",
    out: Path | None = None,
) -> None:
    """Draw curves as `draw_curves` does, to a file, or in a window until the user closes it.

    Args:
        logs: at least one.
        legend: names of the curves.
        keys: what to draw.
        title: above the panels.
        backend: matplotlib backend; None is "agg" with `out`, and matplotlib's default without.
        style: matplotlib style; those of seaborn also by their short name, such as "whitegrid".
        out: the file; None opens a window.

    Raises:
        ValueError: matplotlib has no such backend or style, or cannot open a window.
    """
    import matplotlib.pyplot as plt

    styles = ("default", *plt.style.available)
    # MMDetection takes seaborn's names ("dark"), which matplotlib has as "seaborn-v0_8-dark".
    known = [name for name in (style, f"seaborn-v0_8-{style}") if name in styles]
    if not known:
        raise ValueError(f"--style {style}: not one of {', '.join(styles)}")
    if backend or out:
        try:
            plt.switch_backend(backend or "agg")
        except (ImportError, ValueError) as error:
            raise ValueError(f"--backend {backend}: {error}") from None
    with plt.style.context(known[0]), plt.rc_context():
        plt.rcParams["font.family"] = font_families([*legend, *keys, title])
        figure = plt.figure(figsize=(8, 1 + 3 * len(keys)), dpi=120, layout="constrained")
        draw_curves(figure, logs, legend, keys, title)
    if out:
        save_figure(figure, out)
    elif plt.get_backend().lower() in _WINDOWLESS:
        raise ValueError("cannot open a window here: write a picture with --out FILE")
    else:
        plt.show()
    plt.close(figure)


def _plain(text: str) -> str:
    """Keep matplotlib from reading a name as a formula, or hiding it for its leading "_"."""
    text = drawable(text)
    return ("\u200b" + text if text.startswith("_") else text).replace("$", r"\$")


@dataclass(frozen=True)
class Point:
    """A named point.

    Attributes:
        name: written beside it.
        x: position, in the plot's units.
        y: position, in the plot's units.
        group: points of a group share a color; with several groups there is a legend.
        x_bar: ends of an error bar along x; None draws none.
        y_bar: the same along y.
    """

    name: str
    x: float
    y: float
    group: str = ""
    x_bar: tuple[float, float] | None = None
    y_bar: tuple[float, float] | None = None


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points not dominated by another, from left to right; of equal points all.

    A point dominates another if it is no further right and no lower, and better in one of the two.
    """
    return sorted(
        (p for p in points if not any(_dominates(other, p) for other in points)),
        key=lambda point: point.x,
    )


def _dominates(one: Point, other: Point) -> bool:
    no_worse = one.x <= other.x and one.y >= other.y
    return no_worse and (one.x, one.y) != (other.x, other.y)


def draw_scatter(
    points: Sequence[Point], x_label: str, y_label: str, title: str = "", front: bool = False
) -> Figure:
    """Return a figure with one marker and one name for each point.

    The x axis is logarithmic if all x are positive and span a decade.

    Args:
        points: at least one.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        title: above the plot.
        front: connect the points of `pareto_front` by steps.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("no points to plot: give at least one")
    import matplotlib as mpl

    points = [replace(p, name=_plain(p.name), group=_plain(p.group)) for p in points]
    labels = {
        name: "\n".join(map(_plain, text.split("\n")))
        for name, text in (("xlabel", x_label), ("ylabel", y_label), ("title", title))
    }
    texts = [text for p in points for text in (p.name, p.group)]
    with mpl.rc_context({"font.family": font_families([*texts, *labels.values()])}):
        return _draw(points, labels, front)


def _draw(points: Sequence[Point], labels: dict[str, str], front: bool) -> Figure:
    from matplotlib.figure import Figure

    # Not pyplot: it would keep the figure, and choose a window backend.
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(point.group for point in points))
    for group in groups:
        members = [point for point in points if point.group == group]
        axes.scatter([p.x for p in members], [p.y for p in members], label=group, zorder=2)
    for p in points:
        axes.errorbar(
            *(p.x, p.y),
            xerr=_error_bar(p.x, p.x_bar),
            yerr=_error_bar(p.y, p.y_bar),
            fmt="none",
            ecolor="gray",
            elinewidth=1,
            capsize=3,
            zorder=1,
        )
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


def _error_bar(at: float, bar: tuple[float, float] | None) -> list[list[float]] | None:
    """Return the lengths of a bar below and above, as matplotlib takes them."""
    return None if bar is None else [[max(0.0, at - bar[0])], [max(0.0, bar[1] - at)]]


def _write_names(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each name beside its point, towards the middle, moved down if it hits another."""
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
    """Write a figure atomically; the extension (.png, .svg, .pdf) selects the format.

    Args:
        figure: the figure.
        path: the file; its folder is created.

    Raises:
        ValueError: matplotlib cannot write this format.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{path}: not the name of a picture; end it in .png, .svg or .pdf")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind)
