"""Runs that die and go on: the end is the same, bit for bit."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinydet.training import loop
from tinydet.training.checkpoint import CheckpointError, read_checkpoint, read_last
from tinydet.training.loop import train
from tinydet.training.runs import Saver, newest_to_resume
from tinydet.yolof.encoder import DilatedEncoder


class _Killed(BaseException):
    pass


@pytest.fixture
def dies_after_each_save(monkeypatch):
    """Every process lives until last.pt holds another position than it began with."""
    written, positions = Saver.save_last, [(0, 0)]

    def save_last(saver):
        written(saver)
        position = saver._state.epoch, saver._state.step
        if position != positions[-1]:
            positions.append(position)
            raise _Killed

    def set_up():
        monkeypatch.setattr(Saver, "save_last", save_last)
        return positions

    return set_up


@pytest.fixture
def dropout(monkeypatch):
    """An encoder that draws random numbers in the main process at every step."""
    forward = DilatedEncoder.forward
    monkeypatch.setattr(
        DilatedEncoder, "forward", lambda self, x: F.dropout(forward(self, x), 0.2, self.training)
    )


def _records(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{**json.loads(line), "images_per_second": 0} for line in lines]


def _assert_same(one, two, where=""):
    """Compare nested containers of tensors and numbers bit by bit."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype, where
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            _assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two, strict=True)):
            _assert_same(*pair, f"{where}[{i}]")
    else:
        assert one == two, where


SETTINGS = {
    "plain": ({"ema_decay": 0.9, "batch_size": 6}, {}, {}),
    "branches inside the weights": (
        {"ema_decay": 0.9, "batch_size": 6},
        {},
        {"expand": "dbb", "expand_where": "3x3 5x5", "expand_online": True},
    ),
    "channels_last bfloat16 accumulated sgd": (
        {
            "memory_format": "channels_last",
            "dtype": "bfloat16",
            "accumulate": 3,
            "ema_decay": 0.0,
            "batch_size": 5,
        },
        {"optimizer": "sgd", "lr": 0.01, "clip_norm": 1.0, "schedule": "step"},
        {},
    ),
}


@pytest.mark.usefixtures("dropout")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_killed_at_every_step_ends_like_one_never_killed(
    settings, tiny_experiment, tmp_path, dies_after_each_save
):
    train_settings, optim_settings, model_settings = settings
    experiment = replace(
        tiny_experiment,
        train=replace(tiny_experiment.train, save_minutes=0.0, **train_settings),
        optim=replace(tiny_experiment.optim, **optim_settings),
        model=replace(tiny_experiment.model, **model_settings),
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(experiment, whole)

    positions = dies_after_each_save()
    while positions[-1] != (2, 0):
        resume_from = killed / "last.pt" if len(positions) > 1 else None
        with pytest.raises(_Killed):
            train(experiment, killed, resume_from)
    # In batches; of an epoch's end there is one before its evaluation and one after.
    steps = [1, 2, 3, 4] if experiment.train.accumulate == 1 else [3, 4]
    assert positions == [
        (0, 0),
        *((0, step) for step in steps),
        (1, 0),
        *((1, step) for step in steps),
        (2, 0),
    ]
    one, two = read_checkpoint(whole / "last.pt"), read_checkpoint(killed / "last.pt")
    for content in (one, two):
        del content["train_seconds"]
    _assert_same(one, two)
    _assert_same(
        read_checkpoint(whole / "best.pt")["model"], read_checkpoint(killed / "best.pt")["model"]
    )
    assert _records(whole) == _records(killed)


@pytest.fixture(scope="module")
def stopped(tiny_experiment, tmp_path_factory):
    """A run of two epochs of four batches, killed after six, with one save after five."""
    folder = tmp_path_factory.mktemp("stopped") / "1"
    experiment = replace(
        tiny_experiment, train=replace(tiny_experiment.train, batch_size=6, save_minutes=0.0)
    )
    with pytest.MonkeyPatch.context() as patch:
        written = Saver.save_last

        def save_last(saver):
            if saver._state.steps_done == 6:
                raise _Killed
            written(saver)

        patch.setattr(Saver, "save_last", save_last)
        with pytest.raises(_Killed):
            train(experiment, folder)
    assert read_checkpoint(folder / "last.pt")["step"] == 1
    return folder, experiment


def _copy(stopped, tmp_path):
    return shutil.copytree(stopped[0], tmp_path / "copy"), stopped[1]


def test_nothing_is_logged_twice(stopped, tmp_path):
    folder, experiment = _copy(stopped, tmp_path)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"mode": "train", "epoch": 2, "st')  # as a power cut leaves it
    steps = [
        r["step"] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()[:-1])
    ]
    assert steps == [1, 2, 3, 4, 4, 5, 6]
    train(experiment, folder, folder / "last.pt")
    assert [r["step"] for r in _records(folder)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]

    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))


def test_a_corrupt_last_pt_falls_back_to_the_one_before(stopped, tmp_path, caplog):
    folder, experiment = _copy(stopped, tmp_path)
    content = bytearray((folder / "last.pt").read_bytes())
    # More than the padding between two parts of the archive, of which nothing depends.
    middle = slice(len(content) // 2, len(content) // 2 + 128)
    content[middle] = bytes(byte ^ 1 for byte in content[middle])
    (folder / "last.pt").write_bytes(content)
    train(experiment, folder, folder / "last.pt")
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "last.pt: damaged" in warnings[0]
    assert "last.previous.pt" in warnings[0]
    assert (folder / "last.damaged.pt").read_bytes() == content
    assert read_checkpoint(folder / "last.pt")["epoch"] == 2


def test_two_corrupt_ones_are_an_error_and_stay(stopped, tmp_path):
    folder, experiment = _copy(stopped, tmp_path)
    for name in ("last.pt", "last.previous.pt"):
        (folder / name).write_bytes(b"no")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"last\.previous\.pt: damaged"):
        train(experiment, folder, folder / "last.pt")
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert before == after


def test_a_run_without_last_pt_is_found_by_the_one_before(stopped, tmp_path):
    runs = tmp_path / "runs"
    folder = shutil.copytree(stopped[0], runs / "tiny" / "1")
    (folder / "last.pt").unlink()
    assert newest_to_resume("tiny", runs) == folder / "last.pt"
    content = read_last(folder / "last.pt")
    assert (content["epoch"], content["step"]) == (1, 0)


def test_another_run_is_not_written_over_by_a_resumed_one(stopped, tmp_path):
    folder, experiment = _copy(stopped, tmp_path)
    with pytest.raises(ValueError, match="holds a run already"):
        train(experiment, folder, stopped[0] / "last.pt")


def test_checkpoints_to_keep_are_kept(stopped, tmp_path):
    folder, experiment = _copy(stopped, tmp_path)
    longer = replace(experiment.train, epochs=4, keep_every=2, save_minutes=5.0)
    train(replace(experiment, train=longer), folder, folder / "last.pt")
    assert sorted(p.name for p in folder.glob("epoch_*.pt")) == ["epoch_0002.pt", "epoch_0004.pt"]
    kept = read_checkpoint(folder / "epoch_0002.pt")
    assert (kept["epoch"], kept["step"]) == (2, 0)


def test_a_run_killed_after_an_evaluation_keeps_its_checkpoint_of_the_epoch(
    tiny_experiment, tmp_path, monkeypatch
):
    settings = replace(tiny_experiment.train, keep_every=1)
    experiment = replace(tiny_experiment, train=settings)
    folder, written = tmp_path / "run", Saver.save_last

    def save_last(saver):  # The process dies as soon as a run would go on in the second epoch.
        written(saver)
        if (saver._state.epoch, saver._state.step) == (1, 0):
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save_last", save_last)
        with pytest.raises(_Killed):
            train(experiment, folder)
    train(experiment, folder, folder / "last.pt")
    assert sorted(p.name for p in folder.glob("epoch_*.pt")) == ["epoch_0001.pt", "epoch_0002.pt"]


@pytest.fixture
def scores(monkeypatch):
    """A list of the AP50 that the next evaluations find."""
    evaluate, given = loop.evaluate_detector, []

    def found(*args):
        metrics = evaluate(*args)
        voc = replace(metrics.voc, ap_area=np.full_like(metrics.voc.ap_area, given.pop(0)))
        return replace(metrics, voc=voc)

    monkeypatch.setattr(loop, "evaluate_detector", found)
    return given


def _best(folder):
    """Return the epoch of a folder's best.pt and its AP50, each also by metrics.json."""
    content = read_checkpoint(folder / "best.pt")
    metrics = json.loads((folder / "metrics.json").read_text())
    scores = (round(value, 6) for value in (content["best_ap50"], metrics["AP50"]))
    return content["epoch"], metrics["best_epoch"], *scores


def test_best_pt_is_the_best_of_its_folder(tiny_experiment, tmp_path, scores):
    settings = replace(tiny_experiment.train, keep_every=1)
    experiment = replace(tiny_experiment, train=settings)
    folder = tmp_path / "run"
    scores += [0.3, 0.6]
    train(experiment, folder)
    assert _best(folder) == (2, 2, 0.6, 0.6)
    # From an older checkpoint of the folder: another second epoch, which is worse.
    scores += [0.35]
    train(experiment, folder, folder / "epoch_0001.pt")
    assert _best(folder) == (2, 2, 0.6, 0.6)
    # In another folder, which has no best.pt, and whose epoch is worse than the checkpoint's.
    scores += [0.2]
    train(experiment, tmp_path / "other", folder / "epoch_0001.pt")
    assert _best(tmp_path / "other") == (2, 2, 0.2, 0.2)


def test_an_evaluation_killed_half_way_is_repeated_whole(
    tiny_experiment, tmp_path, scores, monkeypatch
):
    def killed(*_):
        raise _Killed

    scores += [0.3, 0.6]
    with monkeypatch.context() as patch:  # Dies between best.pt and metrics.json.
        results = iter([loop.write_results, killed])
        patch.setattr(loop, "write_results", lambda *args: next(results)(*args))
        with pytest.raises(_Killed):
            train(tiny_experiment, tmp_path / "run")
    assert _best(tmp_path / "run") == (2, 1, 0.6, 0.3)
    scores += [0.6]
    train(tiny_experiment, tmp_path / "run", tmp_path / "run" / "last.pt")
    assert _best(tmp_path / "run") == (2, 2, 0.6, 0.6)


def test_damaged_files_of_a_run_do_not_end_it(tiny_experiment, tmp_path, scores, caplog):
    scores += [0.6, 0.3]
    train(tiny_experiment, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text("{half")
    longer = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=3))
    scores += [0.2]
    train(longer, tmp_path / "run", tmp_path / "run" / "last.pt")
    assert "metrics.json: cannot be read" in caplog.text
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["last_AP50"] == pytest.approx(0.2)
    (tmp_path / "run" / "best.pt").write_bytes(b"half")
    longer = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=4))
    scores += [0.1]
    train(longer, tmp_path / "run", tmp_path / "run" / "last.pt")
    assert "best.pt: taken for no best checkpoint" in caplog.text
    assert _best(tmp_path / "run") == (4, 4, 0.1, 0.1)


def test_where_a_run_continues_is_said(stopped, tmp_path, caplog):
    folder, experiment = _copy(stopped, tmp_path)
    caplog.set_level("INFO")
    content = read_checkpoint(folder / "last.pt")
    train(experiment, folder, folder / "last.pt")
    batches = f"{content['step']} of {content['batches_an_epoch']} batches"
    done = f"{content['epoch']} epochs and {batches} are done"
    assert f"resuming from {folder / 'last.pt'}: {done}" in caplog.text


def test_half_written_files_of_killed_processes_are_removed(stopped, tmp_path):
    folder, experiment = _copy(stopped, tmp_path)
    (folder / ".last.12345.tmp.pt").write_bytes(b"half")
    train(experiment, folder, folder / "last.pt")
    assert not list(folder.glob(".*.tmp*"))


def test_a_run_that_another_process_trains_is_left_alone(stopped, tmp_path):
    folder, experiment = _copy(stopped, tmp_path)
    code = (
        "import pathlib, sys, time\n"
        "from tinydet.training.runs import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])):\n"
        "    print('claimed', flush=True)\n"
        "    time.sleep(300)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "claimed\n"
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises(CheckpointError, match=f"{folder}: another process is training there"):
            train(experiment, folder, folder / "last.pt")
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert before == after
    finally:
        other.kill()
        other.wait()
    train(experiment, folder, folder / "last.pt")  # The claim died with its process.
    train(
        replace(experiment, train=replace(experiment.train, epochs=3)), folder, folder / "last.pt"
    )
    assert read_checkpoint(folder / "last.pt")["epoch"] == 3
