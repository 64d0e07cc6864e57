"""Files that grow during a run, by whole pieces: `log.jsonl`, and TensorBoard's events."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

logger = logging.getLogger(__name__)


class AppendedFile:
    """A file that pieces are appended to, each whole or not at all.

    A piece that cannot be written, on a full disk most likely, is lost and not an error: that is
    told once until it works again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_written = True

    def append(self, piece: bytes) -> None:
        """Append a piece."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with self._path.open("ab") as file:
                file.write(piece)
        except OSError as error:
            with suppress(OSError):  # Half a piece would spoil the next one too.
                os.truncate(self._path, size)
            if self._is_written:
                logger.warning("%s: what comes now is lost: %s", self._path, error.strerror)
            self._is_written = False
        else:
            self._is_written = True


class EventFile:
    """A run's events for TensorBoard, as records that torch and TensorBoard know how to make.

    Not torch's SummaryWriter: it writes in a thread, where a full disk is a traceback on screen and
    the end of all events.

    Args:
        run_dir: where the file goes, beside those of earlier processes.
        done_steps: of the checkpoint that is gone on from; of earlier files TensorBoard drops what
            comes after.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, run_dir: Path, done_steps: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(run_dir / name)
        first = done_steps + 1
        self._append(Event(file_version="brain.Event:2", step=first))
        if done_steps:
            self._append(Event(session_log=SessionLog(status=SessionLog.START), step=first))

    def write(self, step: int, scalars: Mapping[str, float], images: Mapping[str, Tensor]) -> None:
        """Note numbers and (3, H, W) uint8 RGB images of a step, by their names."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard import summary

        parts = [summary.scalar(name, value) for name, value in scalars.items()]
        parts += [summary.image(name, image, dataformats="CHW") for name, image in images.items()]
        self._append(*(Event(summary=part, step=step) for part in parts))

    def _append(self, *events: Event) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        self._file.append(records.getvalue())
