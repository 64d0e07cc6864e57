import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinydet.training import loop
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


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def _steps(log, clock, seconds, epoch, numbers):
    log.start_epoch()
    for number in numbers:
        clock.now += seconds
        losses = {"loss_cls": torch.tensor(0.1 * number), "loss_box": torch.tensor(2.0)}
        log.step(epoch, number, losses, 0.00123, 16)
    log.end_epoch()


def test_a_line_at_the_end_of_each_epoch_and_after_a_pause_that_does_not_count(tmp_path, said):
    clock = _Clock()
    with RunLog(tmp_path, 0, 36, 0, 3, clock) as log:
        _steps(log, clock, 2, 1, range(1, 13))
        clock.now += 500  # an evaluation
        _steps(log, clock, 1, 2, range(13, 25))
        _steps(log, clock, 1, 3, range(25, 37))
    # Losses and images per second of the last two steps; time left by all steps so far.
    assert said() == [
        "epoch 1/3: 12/36 steps, loss_cls 1.150, loss_box 2.000, lr 0.0012, 8.0 img/s, "
        "48 s of training left",
        "epoch 2/3: 24/36 steps, loss_cls 2.350, loss_box 2.000, lr 0.0012, 16.0 img/s, "
        "18 s of training left",
        "epoch 3/3: 36/36 steps, loss_cls 3.550, loss_box 2.000, lr 0.0012, 16.0 img/s",
    ]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 12, 22, 24, 34, 36]


def test_a_slow_machine_speaks_within_the_epoch_and_before_the_tenth_step(tmp_path, said):
    clock = _Clock()
    with RunLog(tmp_path, 0, 200, 0, 2, clock) as log:
        _steps(log, clock, 8, 1, range(1, 5))
    (line,) = said()  # and none of the same step at the end
    assert line == (
        "epoch 1/2: 4/200 steps, loss_cls 0.250, loss_box 2.000, lr 0.0012, 2.0 img/s, "
        "26 min of training left"
    )
    records = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [4]


def test_after_resuming_counts_go_on_and_the_rate_is_this_process_s(tmp_path, said):
    clock = _Clock()
    clock.now = 10_000.0
    with RunLog(tmp_path, 24, 12, 2, 3, clock) as log:
        clock.now += 60  # until the loader's first batch
        _steps(log, clock, 2, 3, range(25, 31))
    assert said()[0].startswith("epoch 3/3: 30/36 steps, ")
    assert said()[0].endswith(", 8.0 img/s, 12 s of training left")


def test_steps_that_are_only_timed_end_no_epoch(tmp_path, said):
    clock = _Clock()
    with RunLog(tmp_path, 0, 10, clock=clock) as log:
        _steps(log, clock, 8, 1, range(1, 11))
    assert said() == [
        "timing training steps: 4/10 steps, 48 s left",
        "timing training steps: 8/10 steps, 16 s left",
    ]


def test_a_training_as_a_pipe_sees_it(tiny_experiment, tmp_path, said, monkeypatch):
    clock = _Clock()

    class Timed(RunLog):
        def __init__(self, *args):
            super().__init__(*args, clock)

        def step(self, *args):
            clock.now += 4
            super().step(*args)

        def evaluation(self, *args):
            clock.now += 1000
            super().evaluation(*args)

    monkeypatch.setattr(loop, "RunLog", Timed)
    loop.train(tiny_experiment, tmp_path / "1")
    epochs = [re.sub(r"[\d.]+(e-\d+)?(?=, )", "_", line) for line in said()]
    assert epochs == [
        "epoch 1/2: 3/6 steps, loss_cls _, loss_box _, lr _, 2.0 img/s, 12 s of training left",
        "epoch 2/2: 6/6 steps, loss_cls _, loss_box _, lr _, 2.0 img/s",
    ]
    longer = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=4))
    loop.train(longer, tmp_path / "1", tmp_path / "1" / "last.pt")
    for line, start, end in zip(
        said()[2:],
        ("epoch 3/4: 9/12 steps, ", "epoch 4/4: 12/12 steps, "),
        (", 2.0 img/s, 12 s of training left", ", 2.0 img/s"),
        strict=True,
    ):
        assert line.startswith(start)
        assert line.endswith(end)
