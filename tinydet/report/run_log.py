"""Reading `log.jsonl`, whatever has become of it: a run may have died in the middle of a line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LONGEST_LINE = 1_000_000  # characters; an evaluation of 1000 classes has a tenth of it


@dataclass
class LogRecords:
    """The lines of a run's log that can be used, in the order of their steps.

    Attributes:
        train: one dict a line of training: "epoch", "step", "loss", "lr" and more.
        val: one dict an evaluation: "epoch", "step", "AP50" and more.
        skipped: lines that cannot be read.
    """

    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and the values of a key, from training lines or else evaluations."""
        for records in (self.train, self.val):
            points = [(r["step"], v) for r in records if (v := number(r.get(key))) is not None]
            if points:
                return [float(step) for step, _ in points], [value for _, value in points]
        return [], []

    def keys(self) -> list[str]:
        """Return the names of all numbers of the log, those of training first."""
        records = (*self.train, *self.val)
        found = {key for record in records for key in record if number(record[key]) is not None}
        order = dict.fromkeys(key for record in records for key in record)
        return [key for key in order if key in found and key not in ("epoch", "step")]


def find_log(path: Path) -> Path:
    """Return the log that a path means: itself, or a run's folder's.

    Raises:
        ValueError: it is a folder without a log.
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
    """Read a log; lines that are not ours are counted and left out.

    A resumed run writes some steps again: what it wrote later counts.

    Raises:
        ValueError: there is no such file.
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


def number(value: Any) -> float | None:
    """Return a value read from JSON as a float; None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def summarize(logs: Sequence[tuple[str, LogRecords, float | None]]) -> list[str]:
    """Return a table to print, a line a log: its best evaluation, speed and time; "-" is unknown.

    Args:
        logs: name, records and seconds of training of each.
    """
    rows = [("log", "epochs", "best epoch", "AP50 %", "AP %", "last loss", "img/s", "minutes")]
    for name, log, seconds in logs:
        judged = [r for r in log.val if number(r.get("AP50")) is not None]
        best = max(judged, key=lambda r: number(r["AP50"]), default={})
        _, losses = log.series("loss")
        _, speeds = log.series("images_per_second")
        epochs = [e for r in log.train + log.val if (e := number(r.get("epoch"))) is not None]
        rows.append(
            (
                name,
                _cell(max(epochs, default=None), ".0f"),
                _cell(number(best.get("epoch")), ".0f"),
                _cell(_percent(best.get("AP50")), ".2f"),
                _cell(_percent(best.get("AP")), ".2f"),
                _cell(losses[-1] if losses else None, ".4g"),
                # Lines are of equally many images: the harmonic mean is that of the whole.
                _cell(_harmonic_mean(speeds), ".1f"),
                _cell(None if seconds is None else seconds / 60, ".1f"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _percent(value: Any) -> float | None:
    value = number(value)
    return None if value is None else 100 * value


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _harmonic_mean(values: list[float]) -> float | None:
    positive = [value for value in values if value > 0]
    return len(positive) / sum(1 / value for value in positive) if positive else None
