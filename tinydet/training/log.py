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

logger = logging.getLogger(__name__)

# Steps between log lines; losses are read from the device only then.
_INTERVAL = 10


class DivergedError(ValueError):
    """The loss is no longer a number; the message names the step and the likely causes."""


class RunLog:
    """Writes one run's progress; use as a context manager."""

    def __init__(self, run_dir: Path, total_steps: int, done_steps: int = 0) -> None:
        self._file = (run_dir / "log.jsonl").open("a")
        self._events = _event_writer(run_dir)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[status]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
        )
        self._task = self._progress.add_task(
            "training", total=total_steps, completed=done_steps, status=""
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
        self._file.close()
        if self._events is not None:
            self._events.close()

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
        self._progress.advance(self._task)
        if len(self._losses) == _INTERVAL:
            self.flush(epoch, step, lr)

    def flush(self, epoch: int, step: int, lr: float) -> None:
        """Show and write the means of the steps noted since the last line, if there are any.

        Raises:
            DivergedError: a loss among them is NaN or infinite.
        """
        if not self._losses:
            return
        means = {
            name: torch.stack([noted[name] for noted in self._losses]).mean().item()
            for name in self._losses[0]
        }
        total = sum(means.values())
        if not math.isfinite(total):
            raise DivergedError(
                f"epoch {epoch}, step {step}: a loss is {total} ({means}); likely a learning rate "
                "too high (optim.lr), a warm-up too short (optim.warmup_iters) or no clipping "
                "(optim.clip_norm); last.pt holds the epoch before"
            )
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
        self._write({"mode": "val", "epoch": epoch, "step": step, **metrics})
        if self._events is None:
            return
        try:
            for name, figures in metrics["per_class"].items():
                for key in ("AP50", "AP"):
                    if figures[key] is not None:
                        self._events.add_scalar(f"{key}_per_class/{name}", figures[key], step)
            for name, image in images.items():
                self._events.add_image(f"detections/{name}", image, step)
        except OSError as error:  # A full disk, most likely.
            logger.warning("no more TensorBoard events: %s", error)
            self._events = None

    def _write(self, record: dict[str, Any]) -> None:
        record = {k: _round(v) for k, v in record.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{record['mode']}/{name}", value, record["step"])


def _round(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _event_writer(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no TensorBoard events: pip install 'tinydet[plots]' for them")
        return None
    return SummaryWriter(str(run_dir))
