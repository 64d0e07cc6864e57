"""What a run's folder says of it, read for the page: checked, since any file may be damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinydet.report.run_log import LogRecords, number, read_log

_JPEG = re.compile(r"/9j/[A-Za-z0-9+/]*={0,2}")  # in base64, from its first three bytes on


@dataclass(frozen=True)
class ClassResult:
    """A class's figures, as fractions; None is unknown.

    Attributes:
        name: of the class.
        boxes: to be found.
        ap50: VOC area average precision.
        ap50_11pt: VOC 2007's.
        ap: COCO's.
        curve: precisions at recalls 0, 0.01, ... 1; empty if not recorded.
    """

    name: str
    boxes: float | None
    ap50: float | None
    ap50_11pt: float | None
    ap: float | None
    curve: list[float]


@dataclass(frozen=True)
class BadImage:
    """An image with errors.

    Attributes:
        name: of the image.
        caption: what is wrong, in words.
        jpeg: the drawing, in base64; empty if it cannot be shown.
        size: its width and height in pixels.
    """

    name: str
    caption: str
    jpeg: str
    size: tuple[int, int]


@dataclass(frozen=True)
class LostAp:
    """The AP50 that each kind of error costs, as fractions by the kind's name.

    Attributes:
        all: empty if not recorded.
        sizes: the same for each size of objects.
        classes: the same of each class.
    """

    all: dict[str, float]
    sizes: dict[str, dict[str, float]]
    classes: dict[str, dict[str, float]]


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        name: of the experiment.
        experiment: resolved, as nested dicts.
        metrics: the numbers of metrics.json.
        classes: a result a class.
        log: the lines of log.jsonl.
        notes: what the run chose by itself, a sentence each.
        lost: to each kind of error.
        images: the worst, the worst first.
        data: name of each split, and the problems found in it.
        sessions: how it was started, each time: pairs of a name and a value.
    """

    name: str
    experiment: dict[str, Any]
    metrics: dict[str, float]
    classes: list[ClassResult]
    log: LogRecords
    notes: list[str]
    lost: LostAp
    images: list[BadImage]
    data: list[tuple[str, list[str]]]
    sessions: list[dict[str, str]]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run's experiment.json, log.jsonl, metrics.json, report.json and sessions.json.

    Raises:
        ValueError: the folder holds no run, or a file in it is no JSON.
    """
    if not (run_dir / "experiment.json").is_file():
        raise ValueError(f"{run_dir}: not a run's folder, it has no experiment.json")
    experiment = _dict(read_json(run_dir / "experiment.json"))
    metrics = _dict(read_json(run_dir / "metrics.json"))
    details = _dict(read_json(run_dir / "report.json"))
    log = run_dir / "log.jsonl"
    curves = _dict(details.get("curves"))
    classes = []
    for name, row in _dict(metrics.get("per_class")).items():
        figures = {key: number(_dict(row).get(key)) for key in ("boxes", "AP50", "AP50_11pt", "AP")}
        curve = [value for v in _list(curves.get(name)) if (value := number(v)) is not None]
        classes.append(ClassResult(str(name), *figures.values(), curve))
    return RunRecord(
        name=str(experiment.get("name") or run_dir.resolve().parent.name),
        experiment=experiment,
        metrics=_numbers(metrics),
        classes=classes,
        log=read_log(log) if log.is_file() else LogRecords(),
        notes=[str(note) for note in _list(details.get("notes"))],
        lost=_lost_ap(_dict(details.get("lost"))),
        images=[_bad_image(_dict(image)) for image in _list(details.get("worst"))],
        data=[
            (str(_dict(split).get("split")), [str(p) for p in _list(_dict(split).get("problems"))])
            for split in _list(details.get("data"))
        ],
        sessions=[
            {str(key): str(value) for key, value in _dict(session).items()}
            for session in _list(read_json(run_dir / "sessions.json"))
        ],
    )


def train_seconds(run_dir: Path) -> float | None:
    """Return the seconds that a run's metrics.json states; None if there is no such number."""
    try:
        return number(_dict(read_json(run_dir / "metrics.json")).get("train_seconds"))
    except ValueError:
        return None


def _lost_ap(values: dict[str, Any]) -> LostAp:
    sizes, classes = (
        {str(name): _numbers(lost) for name, lost in _dict(values.get(key)).items()}
        for key in ("sizes", "classes")
    )
    return LostAp(_numbers(values.get("all")), sizes, classes)


def _numbers(values: Any) -> dict[str, float]:
    known = ((str(key), number(value)) for key, value in _dict(values).items())
    return {key: value for key, value in known if value is not None}


def _bad_image(values: dict[str, Any]) -> BadImage:
    jpeg = str(values.get("jpeg"))
    width, height = (
        int(max(1, min(number(values.get(key)) or 1, 10_000))) for key in ("width", "height")
    )
    return BadImage(
        name=str(values.get("name")),
        caption=str(values.get("caption")),
        jpeg=jpeg if _JPEG.fullmatch(jpeg) else "",
        size=(width, height),
    )


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; None if there is no such file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}); remove it") from None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []
