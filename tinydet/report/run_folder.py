"""Reading a run's folder. Any file in it may be damaged: a run can be killed in mid-write."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinydet.report.table import text_table

_JPEG = re.compile(r"/9j/[A-Za-z0-9+/]*={0,2}")  # base64 of a file that starts as JPEGs do
_LONGEST_LINE = 1_000_000  # characters; an evaluation of 1000 classes takes a tenth of it


@dataclass
class LogRecords:
    """The readable lines of `log.jsonl`, in the order of their steps.

    Attributes:
        train: one dict for each training line: "epoch", "step", "loss", "lr" and more.
        val: one dict for each evaluation: "epoch", "step", "AP50" and more.
        skipped: number of unreadable lines.
    """

    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and values of a key, from training lines or else from evaluations."""
        for records in (self.train, self.val):
            points = [(r["step"], v) for r in records if (v := number(r.get(key))) is not None]
            if points:
                return [float(step) for step, _ in points], [value for _, value in points]
        return [], []

    def keys(self) -> list[str]:
        """Return the names of all numbers in the log, those of training first."""
        records = (*self.train, *self.val)
        found = {key for record in records for key in record if number(record[key]) is not None}
        order = dict.fromkeys(key for record in records for key in record)
        return [key for key in order if key in found and key not in ("epoch", "step")]


@dataclass(frozen=True)
class ClassResult:
    """The results of one class, as fractions; None if unknown.

    Attributes:
        name: class name.
        boxes: number of ground-truth boxes that count.
        ap50: VOC area average precision at IoU 0.5.
        ap50_11pt: VOC 2007 11-point average precision at IoU 0.5.
        ap: COCO average precision.
        curve: precision at recalls 0, 0.01, ... 1; empty if not recorded.
    """

    name: str
    boxes: float | None
    ap50: float | None
    ap50_11pt: float | None
    ap: float | None
    curve: list[float]


@dataclass(frozen=True)
class RankedImage:
    """An image with detection errors.

    Attributes:
        name: image name.
        caption: what is wrong, in words.
        jpeg: the drawing in base64; empty if it is not a JPEG.
        size: width and height in pixels.
    """

    name: str
    caption: str
    jpeg: str
    size: tuple[int, int]


@dataclass(frozen=True)
class LostAp:
    """The AP50 that each kind of error costs: fractions by the name of the kind.

    Attributes:
        all: over all objects; empty if not recorded.
        sizes: the same for each object size.
        classes: the same for each class.
    """

    all: dict[str, float]
    sizes: dict[str, dict[str, float]]
    classes: dict[str, dict[str, float]]


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder.

    Attributes:
        name: experiment name.
        experiment: the resolved experiment, as nested dicts.
        metrics: the numbers in metrics.json.
        classes: one result for each class.
        log: the lines of log.jsonl.
        notes: settings that the run chose automatically, one sentence each.
        lost: AP50 lost to each kind of error.
        images: by "worst", "median" and "best" some images with their errors.
        data: name of each split and the problems found in it.
        sessions: one dict of names and values for each time the run was started or resumed.
    """

    name: str
    experiment: dict[str, Any]
    metrics: dict[str, float]
    classes: list[ClassResult]
    log: LogRecords
    notes: list[str]
    lost: LostAp
    images: dict[str, list[RankedImage]]
    data: list[tuple[str, list[str]]]
    sessions: list[dict[str, str]]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run's experiment.json, log.jsonl, metrics.json, report.json and sessions.json.

    Raises:
        ValueError: the folder is not a run's folder, or a file in it is not JSON.
    """
    if not (run_dir / "experiment.json").is_file():
        raise ValueError(f"{run_dir}: not a run's folder, it has no experiment.json")
    experiment = _dict(read_json(run_dir / "experiment.json"))
    metrics = _dict(read_json(run_dir / "metrics.json"))
    details = _dict(read_json(run_dir / "report.json"))
    log, lost = run_dir / "log.jsonl", _dict(details.get("lost"))
    curves = _dict(details.get("curves"))
    classes = []
    for name, row in _dict(metrics.get("per_class")).items():
        boxes, ap50, ap50_11pt, ap = (
            number(_dict(row).get(key)) for key in ("boxes", "AP50", "AP50_11pt", "AP")
        )
        curve = [value for v in _list(curves.get(name)) if (value := number(v)) is not None]
        classes.append(ClassResult(name, boxes, ap50, ap50_11pt, ap, curve))
    return RunRecord(
        name=str(experiment.get("name") or run_dir.resolve().parent.name),
        experiment=experiment,
        metrics=_numbers(metrics),
        classes=classes,
        log=read_log(log) if log.is_file() else LogRecords(),
        notes=[str(note) for note in _list(details.get("notes"))],
        lost=LostAp(
            _numbers(lost.get("all")),
            {size: _numbers(values) for size, values in _dict(lost.get("sizes")).items()},
            {name: _numbers(values) for name, values in _dict(lost.get("classes")).items()},
        ),
        images={
            rank: [_ranked_image(_dict(image)) for image in _list(details.get(rank))]
            for rank in ("worst", "median", "best")
        },
        data=[
            (str(_dict(split).get("split")), [str(p) for p in _list(_dict(split).get("problems"))])
            for split in _list(details.get("data"))
        ],
        sessions=[
            {key: str(value) for key, value in _dict(session).items()}
            for session in _list(read_json(run_dir / "sessions.json"))
        ],
    )


def train_seconds(run_dir: Path) -> float | None:
    """Return the training time in metrics.json in seconds; None if it is not there."""
    try:
        return number(_dict(read_json(run_dir / "metrics.json")).get("train_seconds"))
    except ValueError:
        return None


def _ranked_image(values: dict[str, Any]) -> RankedImage:
    jpeg = str(values.get("jpeg"))
    width, height = (
        int(max(1, min(number(values.get(key)) or 1, 10_000))) for key in ("width", "height")
    )
    return RankedImage(
        name=str(values.get("name")),
        caption=str(values.get("caption")),
        jpeg=jpeg if _JPEG.fullmatch(jpeg) else "",
        size=(width, height),
    )


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if there is no such file.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}); remove it") from None


def number(value: Any) -> float | None:
    """Return a value read from JSON as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer with hundreds of digits
        return None


def _numbers(values: Any) -> dict[str, float]:
    known = ((key, number(value)) for key, value in _dict(values).items())
    return {key: value for key, value in known if value is not None}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def find_log(path: Path) -> Path:
    """Return the log at a path: the file itself, or the one in a run's folder.

    Raises:
        ValueError: the path is a folder without a log.
    """
    if not path.is_dir():
        return path
    log = path / "log.jsonl"
    if not log.is_file():
        runs = [found for found in path.glob("*/log.jsonl") if found.is_file()]
        newest = max(runs, key=lambda log: log.stat().st_mtime, default=None)
        hint = f"did you mean {newest.parent}?" if newest else "name a run's folder or log.jsonl"
        raise ValueError(f"{path}: a folder without log.jsonl; {hint}")
    return log


def read_log(path: Path) -> LogRecords:
    """Read a log; unreadable lines are counted and skipped.

    A resumed run may log some steps again: the last line of a step counts.

    Raises:
        ValueError: the file cannot be opened.
    """
    log = LogRecords()
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; name a run's log.jsonl") from None
    with file:
        for line in file:
            record = _record(line)
            if record is None:
                log.skipped += bool(line.strip())
                continue
            step, is_train = record["step"], record["mode"] == "train"
            while log.train and log.train[-1]["step"] >= step + (not is_train):
                log.train.pop()
            while log.val and log.val[-1]["step"] >= step:
                log.val.pop()
            (log.train if is_train else log.val).append(record)
    return log


def _record(line: str) -> dict[str, Any] | None:
    if len(line) > _LONGEST_LINE:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("mode") not in ("train", "val"):
        return None
    step = number(record.get("step"))
    return record if step is not None and step >= 0 else None


def summarize(logs: Sequence[tuple[str, LogRecords, float | None]]) -> list[str]:
    """Return the lines of a table with one row for each log; "-" is unknown.

    Args:
        logs: name, records and training time in seconds of each log.
    """
    header = ("log", "epochs", "best epoch", "AP50 %", "AP %", "last loss", "img/s", "minutes")
    rows = []
    for name, log, seconds in logs:
        evaluated = [(ap50, r) for r in log.val if (ap50 := number(r.get("AP50"))) is not None]
        best_ap50, best = max(evaluated, key=lambda pair: pair[0], default=(None, {}))
        _, losses = log.series("loss")
        _, speeds = log.series("images_per_second")
        epochs = [e for r in log.train + log.val if (e := number(r.get("epoch"))) is not None]
        rows.append(
            (
                name,
                _cell(max(epochs, default=None), ".0f"),
                _cell(number(best.get("epoch")), ".0f"),
                _cell(best_ap50, ".2f", 100),
                _cell(number(best.get("AP")), ".2f", 100),
                _cell(losses[-1] if losses else None, ".4g"),
                _cell(_harmonic_mean(speeds), ".1f"),
                _cell(seconds, ".1f", 1 / 60),
            )
        )
    return text_table(header, rows)


def _cell(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(factor * value, form)


def _harmonic_mean(values: list[float]) -> float | None:
    """Return the mean speed of log lines that cover equally many images each."""
    positive = [value for value in values if value > 0]
    return len(positive) / sum(1 / value for value in positive) if positive else None
