import functools
import os
import signal
from dataclasses import replace

import pytest
import torch

from tinydet.training import loop
from tinydet.training.checkpoint import read_checkpoint
from tinydet.training.loop import train
from tinydet.training.nonfinite import DivergedError, NonFiniteGuard
from tinydet.training.signals import Interrupted
from tinydet.yolof.detector import Detector


def _spoil(monkeypatch, steps, spoil="images"):
    """Make numbered training steps (from 0) NaN; return the weights before each step."""
    forward, before = Detector.forward, []

    def spoilt(self, images, targets=None):
        if targets is None:
            return forward(self, images)
        before.append({name: value.clone() for name, value in self.state_dict().items()})
        if len(before) - 1 not in steps:
            return forward(self, images, targets)
        if spoil == "images":  # reaches the statistics of every norm
            return forward(self, images.float() * torch.nan, targets)
        losses, num_positives = forward(self, images, targets)
        # A finite loss whose gradient is not: the root's slope at zero.
        root = (losses["loss_box"] * 0).sqrt()
        return {**losses, "loss_box": losses["loss_box"] + root}, num_positives

    monkeypatch.setattr(Detector, "forward", spoilt)
    return before


def _is_finite(content):
    return all(v.isfinite().all() for v in content.values() if v.is_floating_point())


def _same(one, two):
    return all(
        torch.equal(value, two[name])
        for name, value in one.items()
        if "num_batches_tracked" not in name
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("spoil", ["images", "gradient"])
def test_a_bad_step_leaves_no_trace_but_a_report(
    tiny_experiment, tmp_path, monkeypatch, caplog, optimizer, spoil
):
    before = _spoil(monkeypatch, {0, 2}, spoil)
    optim = replace(tiny_experiment.optim, optimizer=optimizer)
    train(replace(tiny_experiment, optim=optim), tmp_path / "run")
    assert not _same(before[1], before[2])
    assert _same(before[0], before[1])
    if spoil == "images":
        assert _same(before[2], before[3])
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert content["ema_updates"] == 6 - 2
    assert content["steps_done"] == 6
    assert _is_finite(content["model"])
    assert _is_finite(content["raw_model"])
    assert len(list((tmp_path / "run").glob("bad_step_*.pt"))) == 2
    kept = torch.load(tmp_path / "run" / "bad_step_000003.pt", weights_only=True)
    (batch,) = kept["batches"]
    assert batch["images"].shape == (8, 3, 96, 96)
    assert batch["images"].dtype == torch.uint8
    assert len(batch["targets"]) == 8
    line = next(r.getMessage() for r in caplog.records if "epoch 1, step 3" in r.getMessage())
    assert ", ".join(batch["image_ids"]) in line
    assert ("non-finite loss" if spoil == "images" else "non-finite gradient") in line


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adamw", "float32"), ("sgd", "float32"), ("sgd", "bfloat16")]
)
def test_a_verdict_one_step_late_protects_as_well(
    tiny_experiment, tmp_path, monkeypatch, optimizer, dtype
):
    """What CUDA does, here on a CPU: the optimizer skips, the host hears of it a step later."""
    late = functools.partial(NonFiniteGuard, lag=1)
    monkeypatch.setattr(loop, "NonFiniteGuard", late)
    before = _spoil(monkeypatch, {0, 2, 5})
    optim = replace(tiny_experiment.optim, optimizer=optimizer)
    settings = replace(tiny_experiment.train, dtype=dtype)
    train(replace(tiny_experiment, optim=optim, train=settings), tmp_path / "run")
    weights = [name for name, _ in _parameters(before[0])]
    for bad in (0, 2):
        assert all(torch.equal(before[bad][n], before[bad + 1][n]) for n in weights)
    assert not all(torch.equal(before[1][n], before[2][n]) for n in weights)
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert _is_finite(content["model"])
    assert _is_finite(content["raw_model"])
    for state in content["optimizer"]["state"].values():
        assert _is_finite(state)
    assert len(list((tmp_path / "run").glob("bad_step_*.pt"))) == 3


def test_of_two_bad_steps_in_a_row_the_second_verdict_undoes_both(
    tiny_experiment, tmp_path, monkeypatch
):
    late = functools.partial(NonFiniteGuard, lag=1)
    monkeypatch.setattr(loop, "NonFiniteGuard", late)
    _spoil(monkeypatch, {3, 4})  # of the second epoch's three
    train(tiny_experiment, tmp_path / "run")
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert _is_finite(content["model"])
    assert _is_finite(content["raw_model"])


def _parameters(state_dict):
    return [(n, v) for n, v in state_dict.items() if "running" not in n and "num_b" not in n]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_too_many_in_a_row_end_the_run_and_last_pt_is_from_before(
    tiny_experiment, tmp_path, monkeypatch, accumulate
):
    # Epochs of 6 batches: the bad ones begin with the second epoch.
    _spoil(monkeypatch, range(6, 24))
    settings = replace(
        tiny_experiment.train,
        epochs=3,
        batch_size=4,
        accumulate=accumulate,
        save_minutes=0.0,
        max_bad_steps=4,
    )
    message = r"4 steps in a row.*optim\.lr.*warmup_iters.*bad_step_\*\.pt"
    with pytest.raises(DivergedError, match=message):
        train(replace(tiny_experiment, train=settings), tmp_path / "run")
    for name in ("last.pt", "last.previous.pt"):
        content = read_checkpoint(tmp_path / "run" / name)
        assert content["steps_done"] == 6
        assert _is_finite(content["raw_model"])
    kept = sorted((tmp_path / "run").glob("bad_step_*.pt"))
    assert len(kept) == 4
    assert len(torch.load(kept[0], weights_only=True)["batches"]) == accumulate


def test_bad_steps_far_apart_do_not_end_the_run(tiny_experiment, tmp_path, monkeypatch):
    _spoil(monkeypatch, {0, 2, 4})
    settings = replace(tiny_experiment.train, max_bad_steps=2)
    train(replace(tiny_experiment, train=settings), tmp_path / "run")


def test_a_run_whose_last_step_is_bad_ends_with_its_last_weights(
    tiny_experiment, tmp_path, monkeypatch
):
    before = _spoil(monkeypatch, {5})  # of six
    train(tiny_experiment, tmp_path / "run")
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (content["epoch"], content["step"], content["steps_done"]) == (2, 0, 6)
    assert _same(content["raw_model"], before[5])


def test_ctrl_c_in_a_bad_step_saves_what_was_trained(tiny_experiment, tmp_path, monkeypatch):
    before = _spoil(monkeypatch, {4})  # the second of the second epoch
    accepts = NonFiniteGuard.accepts

    def signalled(self, *args):
        accepted = accepts(self, *args)
        if not accepted:
            os.kill(os.getpid(), signal.SIGINT)
        return accepted

    monkeypatch.setattr(NonFiniteGuard, "accepts", signalled)
    with pytest.raises(Interrupted):
        train(tiny_experiment, tmp_path / "run")
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (content["epoch"], content["step"]) == (1, 2)
    assert _same(content["raw_model"], before[4])
