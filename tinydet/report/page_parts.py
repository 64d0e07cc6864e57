"""The parts of a run's page, each made of what its folder says; None where that is nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tinydet.evaluation.metrics import UNDEFINED
from tinydet.report.html import Markup, clip, element, join
from tinydet.report.line_chart import PATTERNS, Axis, Series, line_chart, swatch
from tinydet.report.run_files import BadImage, ClassResult, RunRecord
from tinydet.report.run_log import LogRecords, number

_WIDE, _SMALL = (360, 230), (200, 180)  # charts, and those of many
_FEW = 6
_NAME = 60  # characters shown of a name
_TEXT = 2000  # characters shown of a line

WORST = (
    "Missed objects, plus the scores of false detections: the images with the highest sums, at "
    "IoU 0.5. Detections below a score of 0.3 are left out. Behind a score is the kind of error."
)


def headline(run: RunRecord) -> Markup:
    """Return the run's main figures."""
    m = run.metrics
    seconds, best = m.get("train_seconds"), m.get("best_epoch")
    time, unit = (None, "") if seconds is None else _duration(seconds)
    figures = [
        ("AP50", _percent(m.get("AP50")), "%", "VOC, area"),
        ("AP50, 11-point", _percent(m.get("AP50_11pt")), "%", "VOC 2007"),
        ("AP", _percent(m.get("AP")), "%", "COCO, IoU 0.5 to 0.95"),
        ("Epochs", _form(m.get("epochs"), ".0f"), "", f"best: {best:.0f}" if best else ""),
        ("Training", time, unit, "without evaluation"),
        ("Speed", _form(m.get("images_per_second"), ".1f"), "img/s", "in training"),
    ]
    nothing = element("p", f"AP50 and AP are {UNDEFINED}.") if m.get("boxes") == 0 else None
    main = element(
        "dl",
        *(
            element(
                "div",
                element("dt", name),
                element(
                    "dd",
                    value or "-",
                    element("span", f"\u00a0{unit}", class_="unit") if unit and value else None,
                ),
                element("dd", note or "\u00a0", class_="note"),
            )
            for name, value, unit, note in figures
        ),
        class_="figures",
    )
    return join([main, nothing])


def training_curves(run: RunRecord) -> Markup | None:
    """Return charts of losses, learning rate and average precision over the step."""
    log = run.log
    losses = [key for key in log.keys() if key.startswith("loss")][:PATTERNS]  # noqa: SIM118
    # The parts follow the sum.
    charts = [
        _log_chart(log, losses, "Losses", "loss", low=0.0),
        _log_chart(log, ["lr"], "Learning rate", "learning rate", low=0.0),
        _log_chart(
            log,
            ["AP50", "AP50_11pt", "AP"],
            "Average precision",
            "average precision, %",
            0.0,
            100.0,
        ),
    ]
    shown = [chart for chart in charts if chart]
    if not shown:
        return None
    lines = "line" if log.skipped == 1 else "lines"
    skipped = f"{log.skipped} {lines} of log.jsonl cannot be read: left out."
    return join(
        [
            element("div", *shown, class_="charts"),
            element("p", skipped, class_="quiet") if log.skipped else None,
        ]
    )


def _log_chart(
    log: LogRecords,
    keys: Sequence[str],
    title: str,
    label: str,
    low: float | None = None,
    high: float | None = None,
) -> Markup | None:
    scale = 100 if label.endswith("%") else 1
    series = []
    for key in keys:
        steps, values = log.series(key)
        if steps:
            series.append(Series(clip(key, _NAME), steps, [scale * value for value in values]))
    if not series:
        return None
    ends = "; ".join(f"{s.name} from {s.y[0]:.4g} to {s.y[-1]:.4g}" for s in series)
    chart = line_chart(
        series,
        Axis("step", low=0.0),
        Axis(label, low, high),
        f"{title} over the training step: {ends}.",
    )
    legend = [element("li", swatch(i), s.name) for i, s in enumerate(series) if len(series) > 1]
    return element(
        "figure",
        element("h3", title),
        element("ul", *legend, class_="legend"),
        chart,
    )


def class_table(run: RunRecord) -> Markup | None:
    """Return the average precisions of each class."""
    if not run.classes:
        return None
    titles = ("Class", "Objects", "AP50, %", "11-point, %", "AP, %")
    rows = [_row(c.name, c.boxes, c.ap50, c.ap50_11pt, c.ap) for c in run.classes]
    m = run.metrics
    mean = _row("All classes", m.get("boxes"), m.get("AP50"), m.get("AP50_11pt"), m.get("AP"))
    table = element(
        "table",
        element("thead", element("tr", *(element("th", t, scope="col") for t in titles))),
        element("tbody", *rows),
        element("tfoot", mean),
    )
    box = {"class_": "scroll", "role": "region", "aria_label": "Classes", "tabindex": 0}
    return element("div", table, **box)


def _row(name: str, boxes: float | None, *fractions: float | None) -> Markup:
    cells = [_form(boxes, ".0f"), *(_percent(value) for value in fractions)]
    return element(
        "tr",
        element("th", clip(name, _NAME), scope="row"),
        *(element("td", cell or "-") for cell in cells),
    )


def precision_recall_curves(classes: Sequence[ClassResult]) -> Markup | None:
    """Return a small chart a class."""
    known = [c for c in classes if len(c.curve) == 101]
    if not known:
        return None
    recall = [float(k) for k in range(101)]
    charts = []
    for c in known:
        name, figure = clip(c.name, _NAME), f"AP50 {_percent(c.ap50) or '-'} %"
        chart = line_chart(
            [Series(name, recall, [100 * p for p in c.curve])],
            Axis("recall, %", 0.0, 100.0),
            Axis("precision, %", 0.0, 100.0),
            f"Precision over recall of {name}: {figure}.",
            _SMALL if len(known) > _FEW else _WIDE,
            filled=True,
        )
        caption = element("figcaption", element("b", name), figure)
        charts.append(element("figure", caption, chart))
    return element("div", *charts, class_="charts small" if len(known) > _FEW else "charts")


def worst_images(images: Sequence[BadImage]) -> Markup | None:
    """Return the drawings of the worst images, with a legend."""
    if not images:
        return None
    legend = [
        element(
            "li",
            element("span", class_="key truth"),
            "ground truth, dashed; thick if missed",
        ),
        element(
            "li",
            element("span", class_="key found"),
            "detection, solid; thick if false",
        ),
    ]
    figures = []
    for image in images:
        name, caption = clip(image.name, _NAME), clip(image.caption, _TEXT)
        width, height = image.size
        source = f"data:image/jpeg;base64,{image.jpeg}"
        drawing = element("img", src=source, alt=f"{name}: {caption}", width=width, height=height)
        figures.append(
            element(
                "figure",
                drawing if image.jpeg else None,
                element("figcaption", element("b", name), caption),
            )
        )
    return join(
        [
            element("ul", *legend, class_="legend"),
            element("div", *figures, class_="charts images"),
        ]
    )


def data_problems(data: Sequence[tuple[str, list[str]]]) -> Markup | None:
    """Return what was found wrong in each split."""
    if not data:
        return None
    pieces = []
    for split, problems in data:
        pieces.append(element("h3", clip(split, _NAME)))
        lines = [element("li", clip(line, _TEXT)) for line in problems or ["none"]]
        pieces.append(element("ul", *lines, class_="lines"))
    return join(pieces)


def sessions(run: RunRecord) -> Markup | None:
    """Return how the run was started and went on, and what it chose by itself."""
    pieces = []
    for session in run.sessions:
        command = session.get("command", "")
        facts = [
            join([element("dt", clip(key, _NAME)), element("dd", clip(value, _TEXT))])
            for key, value in session.items()
            if key != "command"
        ]
        pieces += [
            element("pre", clip(command, 2 * _TEXT)),
            element("dl", *facts, class_="facts"),
        ]
    notes = [element("li", clip(note, _TEXT)) for note in run.notes]
    if notes:
        pieces += [element("h3", "Chosen by itself"), element("ul", *notes, class_="lines")]
    return join(pieces) if pieces else None


def experiment(run: RunRecord) -> Markup:
    """Return the resolved experiment, folded away."""
    content = json.dumps(run.experiment, indent=2, ensure_ascii=False)
    return element(
        "details",
        element("summary", "The resolved experiment (experiment.json)"),
        element("pre", clip(content, 50_000)),
    )


def _duration(seconds: float) -> tuple[str, str]:
    if seconds < 60:
        return f"{seconds:.1f}", "s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f}", "min"
    return f"{seconds / 3600:.1f}", "h"


def _percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.1f}"


def _form(value: float | None, form: str) -> str | None:
    return None if value is None else format(number(value) or 0.0, form)
