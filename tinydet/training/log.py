"""What a run reports while it trains: its progress, `log.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinydet.atomic import write_text
from tinydet.progress import Progress
from tinydet.training.distributed import all_reduce_mean, rank

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

# Steps between lines of log.jsonl; losses are read from the device only then.
_INTERVAL = 10


class RunLog:
    """Writes one run's progress; use as a context manager.

    A full disk costs log lines and events, not the run.

    Args:
        run_dir: the run's folder. On resume, log lines after the checkpoint are removed.
        done_steps: batches trained on so far.
        steps_left: batches still to come.
        done_epochs: epochs trained and evaluated so far.
        epochs: of the whole run; None if its steps are only timed, which shows no losses.
        clock: returns seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        done_steps: int,
        steps_left: int,
        done_epochs: int = 0,
        epochs: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._path = run_dir / "log.jsonl" if rank() == 0 else None
        self._is_written = True
        self._events = None
        if self._path is not None:
            if self._path.is_file():
                _drop_later(self._path, done_epochs, done_steps)
            self._path.touch()
            self._events = _summary_writer(run_dir, done_steps)
        self._epochs, self._clock = epochs, clock
        self._progress = Progress(
            "training" if epochs else "timing training steps",
            done_steps + steps_left,
            "steps",
            done=done_steps,
            left="of training left" if epochs else "left",
            clock=clock,
        )
        self._start_line()

    def __enter__(self) -> RunLog:
        # TensorBoard writes in a thread: its traceback on a full disk is not shown.
        self._excepthook, threading.excepthook = threading.excepthook, _ignore_oserror
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__()
        with self._events_may_fail():
            if self._events is not None:
                self._events.close()
        threading.excepthook = self._excepthook

    def start_epoch(self) -> None:
        """Restart the clock: evaluation and saving do not count as training time."""
        self._start_line()
        self._progress.pause()

    def step(
        self, epoch: int, step: int, losses: Mapping[str, Tensor], lr: float, images: int
    ) -> None:
        """Record one training step (numbers from 1); every tenth writes a line, see `flush`."""
        self._losses.append({name: loss.detach() for name, loss in losses.items()})
        self._images += images
        self._position = epoch, step, lr
        if len(self._losses) == _INTERVAL:
            self.flush()
        elif self._progress.is_due:  # by this rank's clock: the others take no part
            self._show(self._means().tolist())
        self._progress.advance()

    def flush(self) -> None:
        """Show and write the mean losses since the last line; non-finite ones are left out."""
        if not self._losses:
            return
        epoch, step, lr = self._position
        means = all_reduce_mean(self._means()).tolist()
        total = sum(means)
        if math.isfinite(total):
            self._show(means)
            losses = dict(zip(self._losses[0], means, strict=True))
            values = {"loss": total, **losses, "lr": lr, "images_per_second": self._speed()}
            self._write({"mode": "train", "epoch": epoch, "step": step, **values})
        self._start_line()

    def end_epoch(self) -> None:
        """As `flush`, and print a line where there is no progress bar."""
        self.flush()
        if self._epochs:
            self._progress.say()

    def _start_line(self) -> None:
        self._losses: list[dict[str, Tensor]] = []
        self._images = 0
        self._since = self._clock()

    def _speed(self) -> float:
        return self._images / (self._clock() - self._since)

    def _means(self) -> Tensor:
        """Return the mean of each loss on this rank since the last line."""
        names = self._losses[0]
        return torch.stack([_finite_mean([n[name] for n in self._losses]) for name in names])

    def _show(self, means: list[float]) -> None:
        if self._epochs is None:
            return
        epoch, _, lr = self._position
        losses = [f"{name} {mean:.3f}" for name, mean in zip(self._losses[0], means, strict=True)]
        self._progress.what = f"epoch {epoch}/{self._epochs}"
        self._progress.status = ", ".join([*losses, f"lr {lr:.2g}", f"{self._speed():.1f} img/s"])

    def evaluation(
        self, epoch: int, step: int, metrics: Mapping[str, Any], images: Mapping[str, Tensor]
    ) -> None:
        """Record an evaluation.

        Args:
            epoch: epochs done.
            step: steps done.
            metrics: as in `metrics.json`.
            images: (3, H, W) uint8 RGB by name, for TensorBoard.
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
        """Append a record to log.jsonl; its numbers, `scalars` and `images` go to TensorBoard."""
        if self._path is None:
            return
        record = {k: _round(v) for k, v in record.items()}
        self._append(self._path, json.dumps(record, allow_nan=False) + "\n")
        with self._events_may_fail():
            if self._events is None:
                return
            for name, value in record.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{record['mode']}/{name}", value, record["step"])
            for name, value in (scalars or {}).items():
                self._events.add_scalar(name, value, record["step"])
            for name, image in (images or {}).items():
                self._events.add_image(name, image, record["step"])
            self._events.flush()

    def _append(self, path: Path, line: str) -> None:
        """Append a whole line to a file, or warn once until it can be written again."""
        size = path.stat().st_size if path.is_file() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
            self._is_written = True
        except OSError as error:
            with suppress(OSError):  # Half a line would spoil the next one too.
                os.truncate(path, size)
            if self._is_written:
                logger.warning("%s: log lines are lost (%s)", path, error.strerror)
            self._is_written = False

    @contextmanager
    def _events_may_fail(self) -> Iterator[None]:
        """Give up TensorBoard events, with a warning, where they cannot be written."""
        try:
            yield
        except OSError as error:
            self._events = None
            logger.warning("no more TensorBoard events: %s", error.strerror or error)


def _ignore_oserror(args: threading.ExceptHookArgs) -> None:
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _finite_mean(losses: list[Tensor]) -> Tensor:
    values = torch.stack(losses)
    return values[values.isfinite()].mean()


def _drop_later(path: Path, epochs: int, steps: int) -> None:
    """Keep the records up to a checkpoint; drop later ones and incomplete lines."""
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


def _summary_writer(run_dir: Path, done_steps: int) -> SummaryWriter | None:
    """Return a TensorBoard writer; TensorBoard ignores earlier events after `done_steps`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no TensorBoard events: pip install 'tinydet[plots]' for them")
        return None
    try:
        return SummaryWriter(str(run_dir), purge_step=done_steps + 1 if done_steps else None)
    except OSError as error:
        logger.warning("no TensorBoard events: %s", error.strerror or error)
        return None
