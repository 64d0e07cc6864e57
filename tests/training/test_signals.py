import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinydet.training.checkpoint import read_checkpoint
from tinydet.training.loop import train
from tinydet.training.results import write_experiment
from tinydet.training.signals import Interrupted, Signals
from tinydet.yolof.detector import Detector

TRAIN = Path(__file__).resolve().parents[2] / "tools" / "train.py"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_deferred_once(number, status):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    reached = []
    with pytest.raises(Interrupted) as caught, Signals().catch() as signals:  # noqa: PT012
        with signals.deferred():
            os.kill(os.getpid(), number)
            time.sleep(0)
            reached.append(signals.received)
        reached.append("after")
    assert reached == [number]
    assert caught.value.exit_status == status

    signals = Signals()
    with pytest.raises(Interrupted), signals.catch(), signals.deferred():  # noqa: PT012
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        reached.append("after two")
    assert reached == [number]

    with pytest.raises(Interrupted), Signals().catch():
        os.kill(os.getpid(), number)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_in_a_step_saves_after_it_and_the_run_goes_on(
    tiny_experiment, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    train(tiny_experiment, tmp_path / "whole")
    calls = iter(range(100))
    forward = Detector.forward

    def signalled(self, *args):
        if next(calls) == 4:  # the second batch of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        # Evaluation calls it in evaluation mode, through `detect`.
        patch.setattr(Detector, "forward", lambda s, *a: (signalled if a[1:] else forward)(s, *a))
        with pytest.raises(Interrupted) as caught:
            train(tiny_experiment, folder)
    assert caught.value.exit_status == 143
    content = read_checkpoint(folder / "last.pt")
    assert (content["epoch"], content["step"]) == (1, 2)
    last = folder / "last.pt"
    assert f"resume with: python tools/train.py {folder}/experiment.json --resume-from {last}" in (
        caplog.text
    )
    train(tiny_experiment, folder, folder / "last.pt")
    one, two = read_checkpoint(tmp_path / "whole" / "last.pt"), read_checkpoint(folder / "last.pt")
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name


def to_the_group(process: subprocess.Popen, log: Path) -> None:
    """As `timeout` does."""
    del log
    os.killpg(process.pid, signal.SIGTERM)


def to_each_process(process: subprocess.Popen, log: Path) -> None:
    """As `pkill -f` and batch systems do, and the training process is the last to get it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGTERM)
    lines = log.read_text()
    while process.poll() is None and log.read_text() == lines:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("stop", [to_the_group, to_each_process])
def test_the_command_ends_with_the_signals_status_even_if_its_workers_get_it(
    stop, tiny_experiment, tmp_path
):
    if stop is to_each_process and not hasattr(signal, "sigwaitinfo"):
        pytest.skip("this system does not tell who sent a signal")
    experiment = replace(
        tiny_experiment,
        data=replace(tiny_experiment.data, workers=1),
        train=replace(tiny_experiment.train, epochs=10_000, eval_every=10_000),
    )
    write_experiment(tmp_path, experiment)
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, TRAIN, tmp_path / "experiment.json", "--work-dir", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (folder / "log.jsonl").is_file() or not (folder / "log.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    stop(process, folder / "log.jsonl")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "stopped by SIGTERM"
    assert f"--resume-from {folder / 'last.pt'}" in " ".join(out.split())
    content = read_checkpoint(folder / "last.pt")
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert content["epoch"] * 3 + content["step"] == json.loads(lines[-1])["step"] > 0
