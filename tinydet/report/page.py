"""`report.html`: a run on one page that needs nothing else, no script and no network."""

from __future__ import annotations

from pathlib import Path

from tinydet.atomic import write_text
from tinydet.report import page_parts as parts
from tinydet.report.error_kinds import LOST, lost_by_class, lost_by_size
from tinydet.report.html import Markup, clip, element, join
from tinydet.report.run_files import RunRecord, read_run

# Were anything on the page not escaped, the browser would still run and fetch nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_page(run_dir: Path) -> Path:
    """Make a run's `report.html` from the files in its folder; returns its path.

    Raises:
        ValueError: the folder holds no run, or a file in it is damaged.
    """
    path = run_dir / "report.html"
    write_text(path, render_page(read_run(run_dir)))
    return path


def render_page(run: RunRecord) -> str:
    """Return the page of a run, in ASCII."""
    style = Path(__file__).with_name("page.css").read_text(encoding="ascii")
    name = clip(run.name, 100)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{name}: TinyDet run"),
        element("style", Markup(style)),
    )
    body = element(
        "main",
        element("header", element("h1", name), element("p", _summary(run), class_="quiet")),
        parts.headline(run),
        _section("Training", "", parts.training_curves(run)),
        _section(
            "Classes",
            "Average precision of best.pt on the test images. AP50: IoU 0.5, area under the curve; "
            "11-point: the same as VOC 2007 took it; AP: COCO's mean over IoU 0.5 to 0.95.",
            parts.class_table(run),
        ),
        _section(
            "Precision and recall",
            "At IoU 0.5, as the average precision counts it: at each recall, the best precision "
            "there or beyond.",
            parts.precision_recall_curves(run.classes),
        ),
        _section("Where AP50 is lost", LOST, lost_by_size(run.lost), lost_by_class(run.lost)),
        _section("Worst images", parts.WORST, parts.worst_images(run.images)),
        _section("Problems found in the data", "", parts.data_problems(run.data)),
        _section("How it was made", "", parts.sessions(run), parts.experiment(run)),
    )
    page = element("html", head, element("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _summary(run: RunRecord) -> str:
    model, train = run.experiment.get("model"), run.experiment.get("train")
    backbone = model.get("backbone") if isinstance(model, dict) else None
    epochs = train.get("epochs") if isinstance(train, dict) else None
    words = [f"YOLOF on {clip(backbone, 60)}" if backbone else "YOLOF"]
    done = run.metrics.get("epochs")
    if done is not None:
        words.append(f"{done:.0f}{f' of {clip(epochs, 12)}' if epochs else ''} epochs trained")
    if "images" in run.metrics:
        words.append(f"tested on {run.metrics['images']:.0f} images")
    return ", ".join(words)


def _section(title: str, explanation: str, *content: Markup | None) -> Markup | None:
    """Return a titled part of the page; None if there is nothing to show."""
    shown = [part for part in content if part]
    if not shown:
        return None
    explained = element("p", explanation, class_="quiet") if explanation else None
    return element("section", element("h2", title), explained, join(shown))
