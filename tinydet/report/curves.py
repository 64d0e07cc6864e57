"""Curves of one or more logs, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinydet.report.fonts import drawable, font_families
from tinydet.report.run_log import LogRecords
from tinydet.report.scatter import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers (jfly.uni-koeln.de/color); the line's
# pattern changes as well.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PATTERNS = ("-", "--", "-.", ":")
_WINDOWLESS = ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template")
_UNITS = {"lr": "learning rate", "images_per_second": "speed (img/s)"}


def draw_curves(
    figure: Figure,
    logs: Sequence[LogRecords],
    legend: Sequence[str],
    keys: Sequence[str],
    title: str = "",
) -> None:
    """Draw a panel a key, with a curve a log in it, over the training step.

    Args:
        figure: an empty one.
        logs: at least one.
        legend: names of the curves: one a log, or one a log and key, a log's keys together.
        keys: what to draw, such as "loss" or "AP50"; average precisions are drawn in percent.
        title: above the panels.

    Raises:
        ValueError: no log has a key, or the legend does not fit.
    """
    if len(legend) not in (len(logs), len(logs) * len(keys)):
        raise ValueError(
            f"--legend has {len(legend)} names for {len(logs)} logs and {len(keys)} keys: give one "
            "a log, or one a log and key"
        )
    panels = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    for row, (axes, key) in enumerate(zip(panels, keys, strict=True)):
        for i, log in enumerate(logs):
            steps, values = log.series(key)
            name = legend[i] if len(legend) == len(logs) else legend[i * len(keys) + row]
            if is_precision(key):
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
            raise ValueError(f"--keys {key}: in none of the logs; they have {', '.join(known)}")
        axes.set_ylabel(_plain(f"{key} (%)" if is_precision(key) else _UNITS.get(key, key)))
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
    """Draw curves as `draw_curves` does, into a file, or into a window that it waits for.

    Args:
        logs: at least one.
        legend: names of the curves.
        keys: what to draw.
        title: above the panels.
        backend: matplotlib's drawing program; None is the one for files, or matplotlib's choice.
        style: one of matplotlib's styles; of seaborn's also the short name, such as "whitegrid".
        out: the file; None opens a window.

    Raises:
        ValueError: matplotlib has no such backend or style; no window can be opened.
    """
    import matplotlib.pyplot as plt

    styles = ("default", *plt.style.available)
    # MMDetection's styles are seaborn's, "dark" and so on, which matplotlib has by a longer name.
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
        raise ValueError("no window can be opened here: name a picture with --out FILE")
    else:
        plt.show()
    plt.close(figure)


def is_precision(key: str) -> bool:
    """Whether a key of the log is an average precision, a fraction shown in percent."""
    return key.startswith("AP")


def _plain(text: str) -> str:
    """Keep matplotlib from reading a name as a formula, or from hiding it (a leading "_")."""
    text = drawable(text)
    return ("\u200b" + text if text.startswith("_") else text).replace("$", r"\$")
