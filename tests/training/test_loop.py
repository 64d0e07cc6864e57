import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tinydet.config import ConfigError
from tinydet.experiment_file import load_experiment
from tinydet.training import loop
from tinydet.training.checkpoint import CheckpointError, read_checkpoint
from tinydet.training.loop import prepare, train
from tinydet.training.nonfinite import DivergedError
from tinydet.training.resume import keep_precision
from tinydet.yolof.build import build_detector
from tinydet.yolof.detector import Detector


def _run(experiment, folder, **kwargs):
    folder.mkdir()
    train(experiment, folder, **kwargs)
    return read_checkpoint(folder / "last.pt")


@pytest.fixture(scope="module")
def trained(tiny_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "1"
    return folder, _run(tiny_experiment, folder)


def test_a_run_leaves_what_the_design_names(trained, tiny_experiment):
    folder, checkpoint = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    named = {"AP50", "AP50_11pt", "AP", "per_class", "train_seconds", "epochs"}
    assert named | {"images_per_second"} <= set(metrics)
    assert metrics["epochs"] == 2
    assert load_experiment(folder / "experiment.json") == tiny_experiment
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records if r["mode"] == "val"] == [1, 2]
    assert "Problems found in the data" in (folder / "report.html").read_text()
    assert list(folder.glob("events.*"))
    assert {p.name for p in folder.glob("*.pt")} == {"best.pt", "last.pt", "last.previous.pt"}
    assert checkpoint["epoch"] == 2
    assert checkpoint["form"] == "training"


def test_folders_and_checkpoints_may_be_named_as_text(trained, tiny_experiment, tmp_path):
    longer = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=3))
    folder = train(longer, str(tmp_path / "text"), str(trained[0] / "last.pt"))
    assert folder == tmp_path / "text"
    assert read_checkpoint(folder / "last.pt")["epoch"] == 3


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    trained, tiny_experiment, tmp_path
):
    again = _run(tiny_experiment, tmp_path / "again")
    for name, tensor in trained[1]["model"].items():
        assert torch.equal(tensor, again["model"][name]), name
    other = replace(tiny_experiment, train=replace(tiny_experiment.train, seed=1))
    other = _run(other, tmp_path / "other")
    name = "head.cls_score.weight"
    assert not torch.equal(trained[1]["model"][name], other["model"][name])


def test_a_resumed_run_ends_like_an_uninterrupted_one(trained, tiny_experiment, tmp_path):
    folder = tmp_path / "resumed"
    folder.mkdir()
    stop = RuntimeError("killed")

    def killed(*_):
        raise stop

    with pytest.MonkeyPatch.context() as patch:
        # Dies in the evaluation after epoch 2, with last.pt of epoch 1 on disk.
        real = loop.evaluate_detector
        calls = iter([real, killed])
        patch.setattr(loop, "evaluate_detector", lambda *a: next(calls)(*a))
        with pytest.raises(RuntimeError, match="killed"):
            train(tiny_experiment, folder)
    assert read_checkpoint(folder / "last.pt")["epoch"] == 1
    train(tiny_experiment, folder, resume_from=folder / "last.pt")
    resumed = read_checkpoint(folder / "last.pt")
    for key in ("model", "raw_model"):
        for name, tensor in trained[1][key].items():
            assert torch.equal(tensor, resumed[key][name]), (key, name)


def test_a_finished_run_is_not_resumed_by_accident_but_can_be_prolonged(
    trained, tiny_experiment, tmp_path
):
    folder, _ = trained
    with pytest.raises(CheckpointError, match="finished its 2 epochs"):
        _run(tiny_experiment, tmp_path / "same", resume_from=folder / "last.pt")
    longer = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=3))
    assert _run(longer, tmp_path / "longer", resume_from=folder / "last.pt")["epoch"] == 3


@pytest.mark.parametrize("online", [False, True])
def test_an_expanded_backbone_trains_its_branches_and_is_kept_with_them(
    tiny_experiment, tmp_path, online
):
    model = replace(tiny_experiment.model, expand="dbb", expand_where="3x3", expand_online=online)
    checkpoint = _run(replace(tiny_experiment, model=model), tmp_path / "expanded")
    assert checkpoint["form"] == "training"
    assert checkpoint["experiment"]["model"]["expand"] == "dbb"
    for weights in (checkpoint["model"], checkpoint["raw_model"]):
        # The weight and the bias of each branch's last norm began at zero.
        last = [name.removesuffix("0.0.weight") for name in weights if "branches.0.0.w" in name]
        assert last
        for name in last:
            assert weights[f"{name}0.1.weight"].abs().sum() > 0
            assert online or weights[f"{name}0.1.bias"].abs().sum() > 0


def test_a_run_that_runs_out_of_memory_says_how_it_goes_on(
    tiny_experiment, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    monkeypatch.setattr(loop, "train_epoch", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(tiny_experiment, tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    assert caplog.messages[-1].endswith(f"--resume-from {last}")


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "images"), [(100, 1, 24), (8, 50, 24), (5, 2, 10), (100, 50, 24)]
)
def test_the_learning_rate_is_for_the_images_that_a_step_has(
    tiny_experiment, batch_size, accumulate, images
):
    settings = replace(tiny_experiment.train, batch_size=batch_size, accumulate=accumulate)
    experiment = replace(tiny_experiment, train=settings)  # of 24 images
    state, *_ = prepare(experiment, torch.device("cpu"))
    assert state.schedule.total_batch == images
    assert state.schedule.lr == pytest.approx(experiment.optim.lr * images / 16)


def test_accumulation_steps_once_for_several_batches(tiny_experiment, tmp_path):
    # 24 images in batches of 8 make 3 batches; of two, the last is a step of its own.
    settings = replace(tiny_experiment.train, accumulate=2)
    checkpoint = _run(replace(tiny_experiment, train=settings), tmp_path / "accumulated")
    assert checkpoint["ema_updates"] == 2 * 2


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (4, 4), (3, 3), (5, 2)])
def test_accumulated_gradients_are_those_of_one_large_batch(
    tiny_experiment, tmp_path, monkeypatch, batch_size, accumulate
):
    """Also of the last group of an epoch, which may have fewer batches."""
    forward, inputs, steps, detectors = Detector.forward, [], [], []

    def noted(self, images, targets=None):
        if targets is not None:
            targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
            inputs.append((images, targets))
            detectors.append(self)
        return forward(self, images, targets)

    def note_gradients(*_):
        gradients = [p.grad.clone() for p in detectors[0].parameters()]
        steps.append((len(inputs), gradients))

    monkeypatch.setattr(Detector, "forward", noted)
    # Norms that take the statistics of a batch would see other batches.
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda self, _=True: nn.Module.train(self, False))
    experiment = replace(
        tiny_experiment,
        model=replace(tiny_experiment.model, backbone="test_resnet", feature="C4"),
        # The learning rate is 0 from the first step on.
        optim=replace(
            tiny_experiment.optim,
            optimizer="sgd",
            schedule="step",
            milestones=(0.0,),
            gamma=0.0,
            warmup_iters=0,
        ),
        train=replace(
            tiny_experiment.train, batch_size=batch_size, accumulate=accumulate, epochs=1
        ),
    )
    # In float64, where nothing but the sums' order is left to differ.
    monkeypatch.setattr(loop, "build_detector", lambda *args: build_detector(*args).double())
    anchors = Detector.anchors
    monkeypatch.setattr(Detector, "anchors", lambda *args: anchors(*args).double())
    hook = register_optimizer_step_pre_hook(note_gradients)
    try:
        _run(experiment, tmp_path / "accumulated")
    finally:
        hook.remove()
    batches = 24 // batch_size
    assert [end for end, _ in steps] == [*range(accumulate, batches, accumulate), batches]

    detector, start = detectors[0], 0
    for end, gradients in steps:
        images = torch.cat([images for images, _ in inputs[start:end]])
        targets = [target for _, targets in inputs[start:end] for target in targets]
        detector.zero_grad()
        losses, _ = forward(detector, images, targets)
        sum(losses.values()).backward()
        whole = torch.cat([p.grad.flatten() for p in detector.parameters()])
        difference = torch.cat([g.flatten() for g in gradients]) - whole
        assert difference.norm() < 1e-6 * whole.norm()  # the sum of positives is float32
        start = end


def test_a_loss_that_is_no_number_stops_the_run_in_one_line(tiny_experiment, tmp_path):
    hot = replace(
        tiny_experiment,
        optim=replace(tiny_experiment.optim, optimizer="sgd", lr=1e30, warmup_iters=0),
        train=replace(tiny_experiment.train, epochs=3),
    )
    with pytest.raises(DivergedError, match=r"optim\.lr"):
        _run(hot, tmp_path / "hot")


@pytest.mark.parametrize("frozen", [{}, {"freeze_norms": True}, {"freeze_stages": 1}])
def test_frozen_random_weights_are_warned_of(frozen, tiny_experiment, caplog):
    experiment = replace(tiny_experiment, model=replace(tiny_experiment.model, **frozen))
    prepare(experiment, torch.device("cpu"))
    assert ("frozen layers never learn" in caplog.text) == bool(frozen)


@pytest.mark.slow
def test_training_lowers_the_loss(tiny_experiment, tmp_path):
    longer = replace(
        tiny_experiment,
        model=replace(tiny_experiment.model, backbone="resnet10t", feature="C4"),
        optim=replace(tiny_experiment.optim, lr=4e-3, clip_norm=5.0),
        train=replace(tiny_experiment.train, epochs=15, eval_every=15),
    )
    folder = tmp_path / "longer"
    _run(longer, folder)
    losses = [
        r["loss"]
        for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        if r["mode"] == "train"
    ]
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_folder_that_holds_a_run_is_not_written_over(trained, tiny_experiment):
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="holds a run already; add --resume"):
        train(tiny_experiment, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_resumed_run_keeps_the_precision_it_was_started_with(trained, tiny_experiment):
    _, checkpoint = trained
    auto = replace(tiny_experiment.train, dtype="auto", memory_format="auto")
    cpu = torch.device("cpu")
    kept = keep_precision(replace(tiny_experiment, train=auto), checkpoint, cpu)
    assert kept == tiny_experiment
    chosen = replace(tiny_experiment.train, dtype="bfloat16", memory_format="auto")
    kept = keep_precision(
        replace(tiny_experiment, train=chosen), checkpoint, torch.device("cpu")
    ).train
    assert (kept.dtype, kept.memory_format) == ("bfloat16", "contiguous")


def test_ctrl_c_says_how_to_go_on(tiny_experiment, tmp_path, caplog):
    folder = tmp_path / "stopped"
    stops = iter([None, KeyboardInterrupt])

    def interrupted(*args):
        stop = next(stops)
        if stop:
            raise stop
        return real(*args)

    caplog.set_level("INFO")
    with pytest.MonkeyPatch.context() as patch:
        real = loop.evaluate_detector
        patch.setattr(loop, "evaluate_detector", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_experiment, folder)
    assert f"--resume-from {folder / 'last.pt'}" in caplog.text


def test_a_resumed_run_times_nothing_anew(trained, tiny_experiment, tmp_path, monkeypatch):
    folder, _ = trained

    def timed(*_):
        raise AssertionError("a resumed run may not choose its precision again")

    monkeypatch.setattr("tinydet.training.precision._time_step", timed)
    settings = replace(tiny_experiment.train, epochs=3, dtype="auto", memory_format="auto")
    longer = replace(tiny_experiment, train=settings)
    train(longer, tmp_path / "longer", resume_from=folder / "last.pt")
    stored = load_experiment(tmp_path / "longer" / "experiment.json").train
    assert (stored.dtype, stored.memory_format) == ("float32", "contiguous")


def test_clipping_bounds_what_a_step_moves_and_no_more(tiny_experiment, tmp_path):
    optim = replace(tiny_experiment.optim, optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    optim = replace(optim, warmup_iters=0, scale_with_batch=False)
    settings = replace(tiny_experiment.train, epochs=1, ema_decay=0.0)
    ends = {}
    for clip_norm in (1e-30, 1e-3, 1e9, 0.0):
        experiment = replace(
            tiny_experiment, optim=replace(optim, clip_norm=clip_norm), train=settings
        )
        end = _run(experiment, tmp_path / str(clip_norm))
        weights = [v.flatten() for k, v in end["model"].items() if k.endswith(("weight", "bias"))]
        ends[clip_norm] = torch.cat(weights)
    start = ends[1e-30]  # nothing moves
    steps = end["steps_done"]
    assert 0 < (ends[1e-3] - start).norm() <= 1.01 * 0.1 * 1e-3 * steps
    assert (ends[0.0] - start).norm() > 0.1 * 1e-3 * steps
    assert torch.equal(ends[1e9], ends[0.0])
