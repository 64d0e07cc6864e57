"""Resuming with other settings: each takes effect or is refused."""

import copy
import dataclasses
import json
import math
import re
import shutil
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinydet.config import Experiment
from tinydet.experiment_file import load_experiment, override
from tinydet.training.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from tinydet.training.loop import prepare, train
from tinydet.training.optim import learning_rate_factor
from tinydet.training.resume import FIXED_FIELDS, check_resumable, keep_precision, restore
from tinydet.training.runs import Saver

CPU = torch.device("cpu")


class _Killed(BaseException):
    pass


def _killed_run(experiment, folder, steps):
    """Train until `steps` batches are done and in last.pt."""
    with pytest.MonkeyPatch.context() as patch:
        written = Saver.save_last

        def save_last(saver):
            written(saver)
            if saver._state.steps_done == steps:
                raise _Killed

        patch.setattr(Saver, "save_last", save_last)
        with pytest.raises(_Killed):
            train(experiment, folder)


@pytest.fixture(scope="module")
def stopped(tiny_experiment, tmp_path_factory):
    """A run of two epochs of four batches, stopped one batch into the second."""
    folder = tmp_path_factory.mktemp("stopped") / "1"
    experiment = replace(
        tiny_experiment,
        train=replace(tiny_experiment.train, batch_size=6, save_minutes=0.0, eval_every=9),
        optim=replace(tiny_experiment.optim, optimizer="sgd", lr=0.01, warmup_iters=0),
    )
    _killed_run(experiment, folder, 5)
    return folder, experiment


def _resume(stopped, folder, assignments):
    shutil.copytree(stopped[0], folder)
    train(override(stopped[1], assignments), folder, folder / "last.pt")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return read_checkpoint(folder / "last.pt"), [r for r in records if r["mode"] == "train"]


@pytest.mark.parametrize(
    ("assignments", "batch"),
    [
        (["train.batch_size=3"], 3),
        (["train.batch_size=12"], 12),
        (["train.batch_size=24"], 24),
        (["train.accumulate=2"], 12),
        (["train.batch_size=3", "train.accumulate=3"], 9),
        (["train.epochs=5"], 6),
        (["train.batch_size=4", "train.epochs=3"], 4),
    ],
)
def test_the_learning_rate_follows_from_the_fraction_of_the_run(
    stopped, tmp_path, assignments, batch
):
    content, records = _resume(stopped, tmp_path / "run", assignments)
    settings = override(stopped[1], assignments).train
    peak = 0.01 * batch / 16  # the linear rule
    at_optimizer_step = -(-(24 // settings.batch_size) // settings.accumulate) * settings.epochs

    def rate(fraction):
        return peak * (1 + math.cos(math.pi * fraction)) / 2

    # One epoch and a quarter of the next are done.
    resumed = next(r for r in records if r["step"] > 5)
    done = 1.25 / settings.epochs
    assert rate(done + 1e-9) - 1e-9 <= resumed["lr"] <= rate(done - 1 / at_optimizer_step) + 1e-9
    # The last optimizer step is one short of the end of the cosine.
    assert records[-1]["lr"] == pytest.approx(rate(1 - 1 / at_optimizer_step), rel=1e-4)
    steps = [r["step"] for r in records]
    assert steps == sorted(set(steps)), "steps are counted on"
    before = read_checkpoint(stopped[0] / "last.pt")
    moved = (content["raw_model"][n] - w for n, w in before["raw_model"].items() if w.ndim == 4)
    assert all(change.abs().max() > 0 for change in moved)
    assert content["epoch"] == settings.epochs


def test_half_an_epoch_of_other_batches_sees_the_other_half(stopped, tmp_path):
    content, _ = _resume(stopped, tmp_path / "run", ["train.batch_size=3"])
    # Of epoch 2 six images were seen: two of its eight batches of 3 are done.
    assert content["images_seen"] == 48


def test_an_epoch_that_is_only_to_be_evaluated_is_not_trained_again(stopped, tmp_path):
    folder = tmp_path / "run"
    experiment = replace(
        stopped[1], train=replace(stopped[1].train, save_minutes=60.0, accumulate=1)
    )
    _killed_run(experiment, folder, 4)
    assert read_checkpoint(folder / "last.pt")["step"] == 4
    other = replace(experiment, train=replace(experiment.train, batch_size=5, accumulate=3))
    train(other, folder, folder / "last.pt")
    content = read_checkpoint(folder / "last.pt")
    assert content["images_seen"] == 24 + 20
    assert content["steps_done"] == 4 + 4


def _changed(experiment, path):
    """Return an assignment that gives a field another value of its type."""
    owner = experiment
    *groups, name = path.split(".")
    for group in groups:
        owner = getattr(owner, group)
    value, hint = getattr(owner, name), typing.get_type_hints(type(owner))[name]
    if typing.get_origin(hint) is typing.Literal:
        value = next(choice for choice in typing.get_args(hint) if choice != value)
    elif isinstance(value, bool):
        value = not value
    elif isinstance(value, tuple):
        value = value[:-1] if path == "model.dilations" else (*value[1:], value[0] / 2)
        value = ",".join(map(str, value)) or "1"
    elif isinstance(value, str):
        value = f"{value}x"
    else:
        value = value + 1 if isinstance(value, int) else value / 2 or 0.5
    return f"{path}={value}"


def _paths(cls=Experiment, prefix=""):
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _paths(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("path", FIXED_FIELDS)
def test_a_field_that_cannot_change_is_refused_by_name(stopped, path):
    folder, experiment = stopped
    experiment = replace(experiment, model=replace(experiment.model, dilations=(2, 4)))
    content = read_checkpoint(folder / "last.pt")
    content["experiment"]["model"]["dilations"] = [2, 4]
    check_resumable(experiment, content, folder / "last.pt")
    # Where attention is placed would have no effect without any.
    with_attention = replace(experiment, model=replace(experiment.model, attention="coord"))
    content["experiment"]["model"]["attention"] = "coord" if "place" in path else "none"
    experiment = with_attention if "place" in path else experiment
    changed = override(experiment, [_changed(experiment, path)])
    with pytest.raises(CheckpointError, match=rf"last\.pt: .*cannot change {path} ") as caught:
        check_resumable(changed, content, folder / "last.pt")
    assert "\n" not in str(caught.value)


OPTIM = [path for path in _paths() if path.startswith("optim.") and path not in FIXED_FIELDS]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("path", OPTIM)
def test_every_other_setting_of_the_optimizer_takes_effect(tiny_experiment, optimizer, path):
    """A resumed optimizer and schedule are those of a fresh run of the changed experiment."""
    experiment = override(tiny_experiment, [f"optim.optimizer={optimizer}", "train.ema_decay=0"])
    if path in ("optim.milestones", "optim.gamma"):
        experiment = override(experiment, ["optim.schedule=step"])
    state, *_ = prepare(experiment, CPU)
    state.epoch = 1
    change = {"optim.schedule": "optim.schedule=step", "optim.momentum": "optim.momentum=0.5"}
    changed = override(experiment, [change.get(path) or _changed(experiment, path)])
    fresh, *_ = prepare(changed, CPU)
    resumed, *_ = prepare(changed, CPU)
    restore(resumed, state.checkpoint(), Path("last.pt"))
    for one, two in zip(resumed.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
        assert {k: v for k, v in one.items() if k not in ("params", "lr")} == {
            k: v for k, v in two.items() if k not in ("params", "lr")
        }
    assert resumed.optimizer_steps_done == 3
    rate = fresh.schedule.lr * learning_rate_factor(changed.optim, fresh.schedule, 3)
    assert resumed.lr == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "formats", [("channels_last", "contiguous"), ("contiguous", "channels_last")]
)
def test_moments_stay_with_their_weights_in_another_memory_format(
    tiny_experiment, optimizer, formats
):
    """The next steps are those of a run that keeps its memory format."""

    def start(memory_format):
        wanted = ["train.dtype=float32", f"train.memory_format={memory_format}"]
        state, *_ = prepare(override(experiment, wanted), CPU)
        return state

    def step(*states):
        for parameters in zip(*(s.detector.parameters() for s in states), strict=True):
            gradient = torch.randn(parameters[0].shape)
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        for state in states:
            state.optimizer.step()

    settings = ["optim.lr=0.01", "optim.warmup_iters=0", "train.ema_decay=0"]
    experiment = override(tiny_experiment, [f"optim.optimizer={optimizer}", *settings])
    kept, resumed = (start(memory_format) for memory_format in formats)
    torch.manual_seed(0)
    step(kept)
    step(kept)
    restore(resumed, copy.deepcopy(kept.checkpoint()), Path("last.pt"))
    step(kept, resumed)
    pairs = zip(kept.detector.parameters(), resumed.detector.parameters(), strict=True)
    apart = [(one - two).abs().max() for one, two in pairs]
    assert max(apart) < 1e-5
    different = {p.stride() for p in kept.detector.parameters()} ^ {
        p.stride() for p in resumed.detector.parameters()
    }
    assert different


def test_momentum_can_be_switched_on(stopped, tmp_path):
    folder = tmp_path / "plain"
    plain = override(stopped[1], ["optim.momentum=0"])
    _killed_run(plain, folder, 5)
    content, _ = _resume((folder, plain), tmp_path / "run", ["optim.momentum=0.9"])
    buffers = [s["momentum_buffer"] for s in content["optimizer"]["state"].values()]
    assert buffers
    assert all(buffer.isfinite().all() for buffer in buffers)


def test_a_float16_run_of_a_gpu_goes_on_in_what_a_cpu_has(stopped, tmp_path, monkeypatch):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    content = read_checkpoint(folder / "last.pt")
    content |= {"dtype": "float16", "scaler": torch.amp.GradScaler("cpu").state_dict()}
    save_checkpoint(folder / "last.pt", content)
    settings = replace(stopped[1].train, dtype="auto", memory_format="contiguous")
    train(replace(stopped[1], train=settings), folder, folder / "last.pt")
    assert read_checkpoint(folder / "last.pt")["dtype"] in ("float32", "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    on_gpu = keep_precision(replace(stopped[1], train=settings), content, torch.device("cuda"))
    assert on_gpu.train.dtype == "float16"


def test_a_float32_run_goes_on_with_a_scaler_of_its_own(stopped):
    folder, experiment = stopped
    state, *_ = prepare(experiment, CPU)
    state.scaler = torch.amp.GradScaler("cpu")
    fresh = state.scaler.state_dict()
    restore(state, read_checkpoint(folder / "last.pt"), folder / "last.pt")
    assert state.scaler.state_dict() == fresh


@pytest.mark.parametrize(("before", "after"), [("0", "0.9"), ("0.9", "0")])
def test_averaged_weights_can_be_switched_on_and_off(stopped, tmp_path, before, after):
    folder = tmp_path / "before"
    experiment = override(stopped[1], [f"train.ema_decay={before}"])
    _killed_run(experiment, folder, 5)
    content, _ = _resume((folder, experiment), tmp_path / "run", [f"train.ema_decay={after}"])
    assert (content["raw_model"] is not None) == (after != "0")


def test_what_changed_is_said_and_kept(stopped, tmp_path, caplog):
    _resume(stopped, tmp_path / "run", ["train.batch_size=8", "optim.weight_decay=0.01"])
    said = "optim.weight_decay 0.0001 -> 0.01, train.batch_size 6 -> 8"
    assert f"resumed with other settings: {said}" in caplog.text
    sessions = json.loads((tmp_path / "run" / "sessions.json").read_text())
    assert [session.get("changed") for session in sessions] == [None, said]
    assert load_experiment(tmp_path / "run" / "experiment.json").train.batch_size == 8


def test_settings_beside_the_training_are_no_change(stopped, tmp_path, caplog):
    _resume(stopped, tmp_path / "run", ["train.eval_batch_size=3", "train.save_minutes=7"])
    assert "other settings" not in caplog.text


def test_the_table_of_what_may_change_is_complete():
    page = Path(__file__).parents[2] / "tools" / "README.md"
    section = page.read_text(encoding="utf-8").split("## Resuming with other settings")[1]
    refused = [row for row in section.splitlines() if row.endswith("| refused |")]
    named = {name for row in refused for name in re.findall(r"`([\w.]+)`", row)}
    assert named == set(FIXED_FIELDS)
    taken = [row for row in section.splitlines() if row.startswith("| `") and row not in refused]
    named |= {name for row in taken for name in re.findall(r"`([\w.]+)`", row)}
    assert {path for path in _paths() if not path.startswith("data.")} <= named
