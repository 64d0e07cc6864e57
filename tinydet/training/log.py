"""What a run says while it goes: a live bar, `log.jsonl`, TensorBoard events."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from tinydet.atomic import write_text
from tinydet.training.appended import AppendedFile, EventFile
from tinydet.training.distributed import mean_over_processes, rank

logger = logging.getLogger(__name__)

# Steps between log lines; losses are read from the device only then.
_INTERVAL = 10


class RunLog:
    """Writes one run's progress; use as a context manager.

    Args:
        run_dir: the run's folder; what an earlier process logged after the checkpoint that is gone
            on from is dropped there, since it is about to come again.
        done_steps: batches trained on so far.
        steps_left: batches still to come.
        done_epochs: epochs of the checkpoint, trained and evaluated.
    """

    def __init__(
        self, run_dir: Path, done_steps: int, steps_left: int, done_epochs: int = 0
    ) -> None:
        self._file = self._events = None
        if rank() == 0:
            path = run_dir / "log.jsonl"
            if path.is_file():
                _drop_later(path, done_epochs, done_steps)
            path.touch()
            self._file, self._events = AppendedFile(path), _event_file(run_dir, done_steps)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[status]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            disable=rank() > 0,
        )
        self._task = self._progress.add_task(
            "training", total=done_steps + steps_left, completed=done_steps, status=""
        )
        self._losses: list[dict[str, Tensor]] = []
        self._images = 0
        self._since = time.perf_counter()

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def start_epoch(self) -> None:
        """Start the clock anew: evaluation and saving do not count as training speed."""
        self._losses, self._images = [], 0
        self._since = time.perf_counter()

    def step(
        self, epoch: int, step: int, losses: Mapping[str, Tensor], lr: float, images: int
    ) -> None:
        """Note one training step (numbers from 1); every tenth writes a line, see `flush`."""
        self._losses.append({name: loss.detach() for name, loss in losses.items()})
        self._images += images
        self._noted = epoch, step, lr
        self._progress.advance(self._task)
        if len(self._losses) == _INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Show and write the means of the steps noted since the last line, if there are any.

        Steps with a loss that is no number are left out.
        """
        if not self._losses:
            return
        epoch, step, lr = self._noted
        names = list(self._losses[0])
        local = torch.stack([_finite_mean([n[name] for n in self._losses]) for name in names])
        means = dict(zip(names, mean_over_processes(local).tolist(), strict=True))
        total = sum(means.values())
        if not math.isfinite(total):
            self.start_epoch()
            return
        speed = self._images / (time.perf_counter() - self._since)
        self._progress.update(
            self._task,
            description=f"epoch {epoch}",
            status=f"cls {means['loss_cls']:.3f} box {means['loss_box']:.3f} lr {lr:.1g} "
            f"{speed:.1f} img/s",
        )
        values = {"loss": total, **means, "lr": lr, "images_per_second": speed}
        self._write({"mode": "train", "epoch": epoch, "step": step, **values})
        self.start_epoch()

    def evaluation(
        self, epoch: int, step: int, metrics: Mapping[str, Any], images: Mapping[str, Tensor]
    ) -> None:
        """Note an evaluation after `epoch`.

        Args:
            epoch: epochs done.
            step: steps done.
            metrics: as in `metrics.json`.
            images: for each name (3, H, W) uint8 RGB, for TensorBoard.
        """
        per_class = {
            f"{key}_per_class/{name}": figures[key]
            for name, figures in metrics["per_class"].items()
            for key in ("AP50", "AP")
            if figures[key] is not None
        }
        self._write({"mode": "val", "epoch": epoch, "step": step, **metrics}, per_class, images)

    def _write(
        self,
        record: dict[str, Any],
        scalars: Mapping[str, float] | None = None,
        images: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Append a record to the log, and its numbers to the events with what goes there alone."""
        if self._file is None:
            return
        record = {k: _round(v) for k, v in record.items()}
        self._file.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        if self._events is not None:
            own = {f"{record['mode']}/{k}": v for k, v in record.items() if isinstance(v, float)}
            self._events.write(record["step"], own | dict(scalars or {}), images or {})


def _finite_mean(losses: list[Tensor]) -> Tensor:
    values = torch.stack(losses)
    return values[values.isfinite()].mean()


def _drop_later(path: Path, epochs: int, steps: int) -> None:
    """Keep the records up to a checkpoint, and drop what is no record, like a line cut short."""
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
            in_finished = record["epoch"] <= epochs
            trained = record["mode"] == "train" and record["step"] <= steps
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if line.endswith("\n") and (in_finished or trained):
            kept.append(line)
    write_text(path, "".join(kept))


def _round(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _event_file(run_dir: Path, done_steps: int) -> EventFile | None:
    try:
        return EventFile(run_dir, done_steps)
    except ImportError:
        logger.info("no TensorBoard events: pip install 'tinydet[plots]' for them")
        return None
