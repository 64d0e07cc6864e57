import errno
import os
import shutil
from dataclasses import replace

import pytest

from tinydet.config import ConfigError
from tinydet.training import checkpoint, loop
from tinydet.training.checkpoint import CheckpointError, read_checkpoint
from tinydet.training.log import RunLog
from tinydet.training.loop import train
from tinydet.training.runs import new_run_dir, newest_checkpoint, newest_to_resume


@pytest.fixture
def full_disk(monkeypatch):
    """Let the writes of checkpoints that are numbered fail half way."""
    written = checkpoint._write

    def set_up(numbers):
        calls = iter(range(1000))

        def write(path, content):
            if next(calls) in numbers:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written(path, content)

        monkeypatch.setattr(checkpoint, "_write", write)

    return set_up


def _warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    tiny_experiment, tmp_path, full_disk, caplog
):
    # 0: the start; then in each epoch its end, best.pt where it is best, and after evaluation.
    full_disk({1, 2, 3})
    train(tiny_experiment, tmp_path / "run")
    assert sum("No space left on device" in line for line in _warnings(caplog)) == 3
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2
    assert not list((tmp_path / "run").glob(".*.tmp*"))


def test_a_disk_that_stays_full_ends_the_run_after_training(tiny_experiment, tmp_path, full_disk):
    full_disk(range(1, 1000))
    with pytest.raises(OSError, match="No space left"):
        train(tiny_experiment, tmp_path / "run")
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (content["epoch"], content["step"]) == (0, 0)


def test_a_disk_full_from_the_start_is_found_out_then(tiny_experiment, tmp_path, full_disk):
    full_disk({0})
    with pytest.raises(OSError, match="No space left"):
        train(tiny_experiment, tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_best_checkpoint_that_was_not_written_is_not_counted(
    tiny_experiment, tmp_path, full_disk
):
    full_disk({2})
    settings = replace(tiny_experiment.train, epochs=1)
    train(replace(tiny_experiment, train=settings), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["best_ap50"] == -1
    assert not (tmp_path / "run" / "best.pt").exists()


def test_a_deleted_folder_is_made_anew(tiny_experiment, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    evaluate = loop.evaluate_detector

    def deleted(*args):
        shutil.rmtree(folder)
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate_detector", deleted)
    settings = replace(tiny_experiment.train, eval_every=2)
    train(replace(tiny_experiment, train=settings), folder)
    assert {"last.pt", "best.pt", "experiment.json"} <= {path.name for path in folder.iterdir()}
    assert read_checkpoint(folder / "last.pt")["epoch"] == 2
    assert any("created again" in line for line in _warnings(caplog))


def test_lines_that_cannot_be_written_are_said_once(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    metrics = {"AP50": 0.5, "per_class": {}}
    with RunLog(tmp_path / "run", 0, 10) as log:
        log.evaluation(1, 3, metrics, {})
        shutil.move(tmp_path / "run", tmp_path / "moved")
        log.evaluation(2, 6, metrics, {})
        log.evaluation(3, 9, metrics, {})
        shutil.move(tmp_path / "moved", tmp_path / "run")
        log.evaluation(4, 12, metrics, {})
    assert sum("log.jsonl: log lines are lost" in line for line in _warnings(caplog)) == 1
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert ['"epoch": 1' in lines[0], '"epoch": 4' in lines[1]] == [True, True]


def test_runs_are_found_by_their_name_as_it_is_written(tmp_path):
    for name in ("exp[1]", "exp1"):
        last = new_run_dir(name, tmp_path) / "last.pt"
        last.touch()
        os.utime(last, (0, len(name)))  # the second is older
    assert newest_to_resume("exp[1]", tmp_path) == tmp_path / "exp[1]" / "1" / "last.pt"
    assert newest_to_resume("exp1", tmp_path) == tmp_path / "exp1" / "1" / "last.pt"
    assert newest_checkpoint(tmp_path, "last.pt") == tmp_path / "exp[1]" / "1" / "last.pt"
    with pytest.raises(CheckpointError, match="no run has one yet"):
        newest_to_resume("exp?", tmp_path)
    with pytest.raises(ConfigError, match="name: is empty"):
        new_run_dir("", tmp_path)
