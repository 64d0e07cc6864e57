import argparse
import contextlib
import json

import pytest
import torch

from tinydet.cli import load_predictor, select_checkpoint, set_threads
from tinydet.training import threads
from tinydet.training.loop import train
from tinydet.training.threads import Threads, fastest_threads

_CPU = torch.device("cpu")


@pytest.fixture
def _four_threads(monkeypatch):
    """As if the process had begun with four threads on a crowded machine."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def _speeds(monkeypatch, speeds):
    monkeypatch.setattr(threads, "_speed", speeds.__getitem__)


@pytest.mark.parametrize(
    ("speeds", "fastest"),
    [
        ({1: 10, 2: 20, 3: 30, 4: 40}, 4),  # idle
        ({1: 10, 2: 20, 3: 30, 4: 28}, 4),  # noise
        ({1: 10, 2: 19, 3: 29, 4: 5}, 3),  # one busy program
        ({1: 10, 2: 9.5, 3: 4, 4: 2}, 2),
        ({1: 10, 2: 2, 3: 2, 4: 2}, 1),
    ],
)
def test_the_number_of_threads_that_computes_most_per_second(monkeypatch, speeds, fastest):
    _speeds(monkeypatch, speeds)
    assert fastest_threads(4) == fastest


@pytest.mark.parametrize(
    ("most", "tried"), [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (64, {1, 2, 4, 8, 16, 32, 63, 64})]
)
def test_candidates(monkeypatch, most, tried):
    seen = []
    monkeypatch.setattr(threads, "_speed", lambda n: seen.append(n) or n)
    assert fastest_threads(most) == most
    assert set(seen) == tried


@pytest.mark.usefixtures("_four_threads")
def test_adapts_every_half_minute_and_says_so(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = 100.0
    monkeypatch.setattr(threads.time, "monotonic", lambda: now)
    adapting = Threads(_CPU)

    _speeds(monkeypatch, {1: 10, 2: 9, 3: 5, 4: 5})
    adapting.adapt()
    assert torch.get_num_threads() == 1
    assert "1 thread instead of 4: other programs are using the cores" in caplog.text

    _speeds(monkeypatch, {1: 10, 2: 20, 3: 30, 4: 40})
    now = 129.0
    adapting.adapt()
    assert torch.get_num_threads() == 1
    now = 131.0
    adapting.adapt()
    assert torch.get_num_threads() == 4
    assert caplog.messages[-1] == "4 threads again"

    now = 200.0
    adapting.adapt()
    assert torch.get_num_threads() == 4
    assert len(caplog.messages) == 2  # no change, no line


@pytest.mark.usefixtures("_four_threads")
def test_a_number_that_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setattr(threads, "_speed", lambda _: pytest.fail("measured"))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    Threads(_CPU).adapt()
    monkeypatch.delenv("OMP_NUM_THREADS")
    Threads(torch.device("cuda")).adapt()
    monkeypatch.setattr(threads, "world_size", lambda: 2)
    Threads(_CPU).adapt()
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("_four_threads")
def test_measuring_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Threads(_CPU).adapt()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.usefixtures("_four_threads")
def test_a_command_takes_the_number_asked_for_or_else_the_fastest(monkeypatch):
    _speeds(monkeypatch, {1: 10, 2: 19, 3: 8, 4: 8})
    set_threads(3)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(4)
    set_threads(None)
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="--threads 0: must be at least 1"):
        set_threads(0)


@pytest.mark.parametrize("select", [select_checkpoint, load_predictor])
def test_deploying_and_drawing_adapt(monkeypatch, tmp_path, select):
    asked = []
    monkeypatch.setattr(Threads, "adapt", lambda _: asked.append(1))
    path = tmp_path / "a.onnx"
    args = argparse.Namespace(
        experiment=None, checkpoint=path, device="cpu", score_threshold=0.3, set=[]
    )
    with contextlib.suppress(ValueError):  # The file is not there.
        select(*(args, "best.pt")[: 2 if select is select_checkpoint else 1])
    assert asked == [1]


def test_training_adapts_at_the_start_between_steps_and_in_evaluation(
    tiny_experiment, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(Threads, "adapt", lambda _: calls.append(len(calls)))
    train(tiny_experiment, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    steps = max(record["step"] for record in records)
    evaluations = sum(record["mode"] == "val" for record in records)
    assert len(calls) >= 1 + steps + evaluations
