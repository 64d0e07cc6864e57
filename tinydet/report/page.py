"""`report.html`: a run on one page, in a single file without scripts or network access."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from tinydet.atomic import write_text
from tinydet.evaluation.metrics import UNDEFINED
from tinydet.evaluation.tide import KINDS, SUMS
from tinydet.evaluation.tide_table import HEADS, NOT_TIDECV
from tinydet.report.run_folder import ClassResult, LogRecords, RunRecord, read_run

# Control characters, marks of bidirectional text and halves of surrogate pairs: a browser would
# drop them, or reorder the text around them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_DESCRIPTIONS = {
    "classification": "right place, wrong class",
    "localisation": "right class, IoU 0.1 to 0.5",
    "both": "wrong class, IoU 0.1 to 0.5",
    "duplicate": "object already found with a higher score",
    "background": "no object there",
    "missed": "object not found at all",
}

_WIDE, _SMALL = (360, 230), (200, 180)  # width and height of charts in pixels
_MOST_WIDE = 6  # with more classes than this their charts are small
_MOST_POINTS = 240  # of a curve; more could not be seen
_DOTS_BELOW = 30  # a curve with fewer points has a dot at each

# The dashes of curves, in pixels; their colors are CSS variables --c0 to --c5. A chart is drawn in
# placeholder colors which are then replaced, so that it follows the page into dark mode.
DASHES = ((), (7, 4), (2, 4), (9, 3, 2, 3), (12, 4), (4, 2))
_VARIABLES = {"#00000a": "ink", "#00000b": "quiet", "#00000c": "rule"} | {
    f"#00000{i + 1}": f"c{i}"
    for i in range(len(DASHES))  # matplotlib leaves out black
}
_COLORS = {variable: color for color, variable in _VARIABLES.items()}


def write_page(run_dir: Path) -> Path:
    """Create a run's `report.html` from the files in its folder, and return its path.

    Raises:
        ValueError: the folder is not a run's folder, or a file in it is damaged.
    """
    path = run_dir / "report.html"
    write_text(path, render_page(read_run(run_dir)))
    return path


def render_page(run: RunRecord) -> str:
    """Return the page of a run, in ASCII: other characters are written as references."""
    page = _template().render(
        run=run,
        summary=_summary(run),
        headline=_headline(run),
        undefined=UNDEFINED,
        charts=_training_charts(run.log),
        curves=_precision_recall_charts(run.classes),
        small_curves=len(run.classes) > _MOST_WIDE,
        kinds=[(kind, HEADS[kind], _DESCRIPTIONS[kind]) for kind in KINDS],
        sums=SUMS,
        most_lost=max((run.lost.all.get(kind, 0.0) for kind in KINDS), default=0.0),
        not_tidecv=" ".join(NOT_TIDECV),
        experiment=json.dumps(run.experiment, indent=2, ensure_ascii=False),
        dashes=DASHES,
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clip": _clip, "percent": _percent}
    return environment.get_template("page.html.jinja")


def _printable(value: Any) -> Any:
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return _UNPRINTABLE.sub("\ufffd", value) if is_text else value


def _clip(value: Any, length: int) -> str:
    """Return text of at most `length` characters; an ellipsis replaces its middle."""
    text = str(value)
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}…{text[len(text) - half :]}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _summary(run: RunRecord) -> str:
    model, train = run.experiment.get("model"), run.experiment.get("train")
    backbone = model.get("backbone") if isinstance(model, dict) else None
    epochs = train.get("epochs") if isinstance(train, dict) else None
    parts = [f"YOLOF on {_clip(backbone, 60)}" if backbone else "YOLOF"]
    done = run.metrics.get("epochs")
    if done is not None:
        parts.append(f"{done:.0f}{f' of {_clip(epochs, 12)}' if epochs else ''} epochs trained")
    if "images" in run.metrics:
        parts.append(f"tested on {run.metrics['images']:.0f} images")
    return ", ".join(parts)


def _headline(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """Return name, value, unit and note of the run's main numbers."""
    metrics = run.metrics
    seconds, best = metrics.get("train_seconds"), metrics.get("best_epoch")
    epochs, speed = metrics.get("epochs"), metrics.get("images_per_second")
    time, unit = _duration(seconds)
    count, note = "-" if epochs is None else f"{epochs:.0f}", f"best: {best:.0f}" if best else ""
    return [
        ("AP50", _percent(metrics.get("AP50")), "%", "VOC, area"),
        ("AP50, 11-point", _percent(metrics.get("AP50_11pt")), "%", "VOC 2007"),
        ("AP", _percent(metrics.get("AP")), "%", "COCO, IoU 0.5 to 0.95"),
        ("Epochs", count, "", note),
        ("Training", time, unit, "without evaluation"),
        ("Speed", "-" if speed is None else f"{speed:.1f}", "img/s", "in training"),
    ]


def _duration(seconds: float | None) -> tuple[str, str]:
    if seconds is None:
        return "-", ""
    if seconds < 60:
        return f"{seconds:.1f}", "s"
    return (f"{seconds / 60:.1f}", "min") if seconds < 7200 else (f"{seconds / 3600:.1f}", "h")


def _training_charts(log: LogRecords) -> list[dict[str, Any]]:
    """Return charts of losses, learning rate and average precision over the step."""
    losses = [key for key in log.keys() if key.startswith("loss")][: len(DASHES)]  # noqa: SIM118
    charts = []
    for title, label, keys, scale, top in (
        ("Losses", "loss", losses, 1, None),
        ("Learning rate", "learning rate", ["lr"], 1, None),
        ("Average precision", "average precision, %", ["AP50", "AP50_11pt", "AP"], 100, 100),
    ):
        found = {key: points for key in keys if (points := log.series(key))[0]}
        curves = [(x, [scale * v for v in y]) for x, y in found.values()]
        if not curves:
            continue
        ends = [
            f"{_clip(key, 60)} from {y[0]:.4g} to {y[-1]:.4g}"
            for key, (_, y) in zip(found, curves, strict=True)
        ]
        charts.append(
            {
                "title": title,
                "names": list(found),
                "description": f"{title} over the training step: {'; '.join(ends)}.",
                "svg": line_charts([curves], "step", label, top=top)[0],
            }
        )
    return charts


def _precision_recall_charts(classes: Sequence[ClassResult]) -> list[tuple[ClassResult, Markup]]:
    """Return each class whose curve is known, with a chart of it."""
    recall = list(range(101))
    size = _WIDE if len(classes) <= _MOST_WIDE else _SMALL
    known = [result for result in classes if len(result.curve) == len(recall)]
    charts = line_charts(
        [[(recall, [100 * precision for precision in result.curve])] for result in known],
        "recall, %",
        "precision, %",
        size,
        right=100,
        top=100,
        filled=True,
    )
    return list(zip(known, charts, strict=True))


def line_charts(
    charts: Sequence[Sequence[tuple[Sequence[float], Sequence[float]]]],
    x_label: str,
    y_label: str,
    size: tuple[int, int] = _WIDE,
    right: float | None = None,
    top: float | None = None,
    filled: bool = False,
) -> list[Markup]:
    """Return charts with the same axes as SVG elements that are styled by the page they are in.

    All text is plain text in the page's font. Both axes include 0.

    Args:
        charts: for each chart its curves, at most as many as there are `DASHES`; for each curve its
            x and y values.
        x_label: name and unit of the x axis.
        y_label: name and unit of the y axis.
        size: width and height in pixels; the font has 13.
        right: where the x axis ends; None is a round number beyond the data.
        top: where the y axis ends, likewise.
        filled: shade the area below the curves.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, height = size
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "tinydet",
        "font.size": 13,
        "axes.autolimit_mode": "round_numbers",
        "axes.xmargin": 0,
        "axes.ymargin": 0,
        "axes.edgecolor": _COLORS["quiet"],
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "xtick.color": _COLORS["quiet"],
        "ytick.color": _COLORS["quiet"],
        "ytick.major.size": 0,
        "lines.linewidth": 2,
        "lines.markersize": 5,
        "lines.scale_dashes": False,
    }
    svgs = []
    with mpl.rc_context(style):
        figure = Figure((width / 72, height / 72))  # an SVG has 72 dots per inch
        axes = figure.add_axes((44 / width, 42 / height, 1 - 58 / width, 1 - 74 / height))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        figure.text(2 / width, 1 - 12 / height, y_label, color=_COLORS["ink"])
        figure.text(
            1 - 14 / width, 5 / height, x_label, color=_COLORS["ink"], horizontalalignment="right"
        )
        axes.grid(axis="y", color=_COLORS["rule"], dashes=(2, 3), linewidth=1, clip_on=False)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(max(2, width // 90), steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(_tick_label)
        axes.yaxis.set_major_formatter(_tick_label)
        axes.update_datalim([(0, 0)])
        for curves in charts:  # A new figure for each would take twice the time.
            for artist in (*axes.lines, *axes.collections):
                artist.remove()
            for i, curve in enumerate(curves):
                x, y = map(_thinned, curve)
                color, dashes = _COLORS[f"c{i}"], DASHES[i]
                marker = "o" if len(x) < _DOTS_BELOW else ""
                line = axes.plot(x, y, color=color, marker=marker, clip_on=False)[0]
                line.set_linestyle((0, dashes) if dashes else "-")
                if filled:
                    axes.fill_between(x, y, color=color, alpha=0.12, linewidth=0, clip_on=False)
            axes.autoscale_view()
            if right is not None:
                axes.set_xlim(0, right)
            if top is not None:
                axes.set_ylim(0, top)
            buffer = io.StringIO()
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", metadata=metadata)
            svgs.append(Markup(_embedded(buffer.getvalue(), size)))
    return svgs


def _thinned(values: Sequence[float]) -> np.ndarray:
    """Return the values; of many, the means of equally long pieces."""
    array = np.clip(np.asarray(values, dtype=float), -1e100, 1e100)  # floats may not overflow
    piece = -(-len(array) // _MOST_POINTS)
    starts = np.arange(0, len(array), piece)
    return np.add.reduceat(array, starts) / np.diff([*starts, len(array)])


def _tick_label(value: float, _: float) -> str:
    if 1000 <= abs(value) < 1e6:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.01:
        return np.format_float_scientific(value, precision=2, trim="-", exp_digits=1)
    return f"{value:.4g}"


def _embedded(svg: str, size: tuple[int, int]) -> str:
    """Return matplotlib's SVG file as an element of a page: smaller, and styled by the page."""
    content = svg[svg.index("<g ") : svg.rindex("</svg>")]
    for pattern, replacement in (
        (r"\n\s*", ""),
        (r'<g id="[^"]*"/>', ""),
        (r'<g id="[^"]*">', "<g>"),  # the ids of one chart are those of every other
        (r"font-family: [^;]*; ", ""),
        (r' transform="rotate\(-0 [^"]*"', ""),
        (r"(\d+\.\d)\d{5,}", r"\1"),  # a tenth of a pixel is enough
    ):
        content = re.sub(pattern, replacement, content)
    for color, variable in _VARIABLES.items():
        content = content.replace(color, f"var(--{variable})")
    return (
        f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" aria-hidden="true">{content}</svg>'
    )
