import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from tinydet.training.appended import AppendedFile, EventFile


class FullDisk:
    """An open file that takes so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, piece):
        self.file.write(piece[: self.room])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.fixture
def disk(monkeypatch):
    """What is appended fails once there is a number of bytes under "room"."""
    opened, disk = Path.open, {}

    def open_(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        return FullDisk(file, disk["room"]) if disk and "a" in mode else file

    monkeypatch.setattr(Path, "open", open_)
    return disk


def test_a_piece_is_whole_or_not_there_and_the_loss_is_told_once(tmp_path, disk, caplog):
    path = tmp_path / "log"
    file = AppendedFile(path)
    file.append(b"one\n")
    disk["room"] = 2
    file.append(b"two\n")
    file.append(b"three\n")
    del disk["room"]
    file.append(b"four\n")
    assert path.read_bytes() == b"one\nfour\n"
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text


def test_events_are_read_by_tensorboard_across_a_full_disk(tmp_path, disk, capfd):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = EventFile(tmp_path, 0)
    for step in (1, 2, 3):
        if step == 2:
            disk["room"] = 30
        events.write(step, {"loss": 0.5 * step}, {"seen": torch.zeros(3, 4, 6, dtype=torch.uint8)})
        disk.clear()
    found = accumulators.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 0.5), (3, 1.5)]
    assert [(e.width, e.height) for e in found.Images("seen")] == [(6, 4)] * 2
    assert "Traceback" not in capfd.readouterr().err


def test_events_after_the_checkpoint_that_is_gone_on_from_are_dropped(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for number, (done, values) in enumerate([(0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0})]):
        events = EventFile(tmp_path, done)
        for step, value in values.items():
            events.write(step, {"loss": value}, {})
        # As of two processes, one after the other.
        (written,) = (file for file in tmp_path.iterdir() if file.suffix != ".first")
        written.rename(written.with_name(f"{written.name}{('.first', '.second')[number]}"))
    found = accumulators.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
