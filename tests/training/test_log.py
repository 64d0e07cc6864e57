import errno
import json
import os
from pathlib import Path

import pytest
import torch

from tinydet.training.log import RunLog

METRICS = {"AP50": 0.5, "per_class": {"cat": {"AP50": 0.25, "AP": None}}}
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _FullDisk:
    """An open file that takes two more characters."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        self.file.write(text[:2])
        raise NO_SPACE

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def test_a_line_is_complete_or_missing_and_the_loss_is_said_once(tmp_path, monkeypatch, caplog):
    opened, full = Path.open, []

    def open_(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        return _FullDisk(file) if full and path.name == "log.jsonl" and mode == "a" else file

    monkeypatch.setattr(Path, "open", open_)
    with RunLog(tmp_path, 0, 10) as log:
        for epoch in (1, 2, 3, 4):
            full[:] = [True] if epoch in (2, 3) else []
            log.evaluation(epoch, epoch, METRICS, {})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 4]
    assert caplog.text.count("log lines are lost") == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_events_and_not_the_run(tmp_path, monkeypatch, caplog, capfd):
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def fail(*_):
        raise NO_SPACE

    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    with RunLog(tmp_path, 0, 10) as log:
        log.evaluation(1, 3, METRICS, {"seen": image})
        monkeypatch.setattr(record_writer.RecordWriter, "write", fail)
        for epoch in (2, 3):
            log.evaluation(epoch, 3 * epoch, METRICS, {"seen": image})
    assert caplog.text.count("no more TensorBoard events: No space left on device") == 1
    assert "Traceback" not in capfd.readouterr().err
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/AP50")] == [(3, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("AP50_per_class/cat")] == [(3, 0.25)]
    assert [(e.width, e.height) for e in events.Images("seen")] == [(6, 4)]
