"""What a GPU computes beside what a CPU computes; skipped where there is none."""

from dataclasses import replace
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from tinydet.data.dataset import DetectionDataset, load_split
from tinydet.data.loader import make_train_loader
from tinydet.data.seeding import seed_globally
from tinydet.deployment.fold_checkpoint import fold_detector
from tinydet.deployment.speed import time_checkpoint
from tinydet.reparam import expand, fold
from tinydet.training.checkpoint import load_checkpoint, read_checkpoint
from tinydet.training.loop import _optimizer_step, prepare, train
from tinydet.training.nonfinite import NonFiniteGuard
from tinydet.yolof.build import build_detector
from tinydet.yolof.decode import postprocess
from tinydet.yolof.detector import Detector
from tinydet.yolof.matcher import uniform_match

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def _full_precision():
    """Without TF32, whose products have ten bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.set_float32_matmul_precision("highest")  # the default
        yield


@pytest.fixture
def experiment(tiny_experiment):
    return _on(tiny_experiment, "cuda")


def _on(experiment, device, **settings):
    return replace(experiment, train=replace(experiment.train, device=device, **settings))


def _step(state, batch, guard):
    """Make a training step as the loop does."""
    guard.snapshot()
    images = batch.images.contiguous(memory_format=state.precision.torch_format)
    seed_globally(images.device, "step", 0)
    with state.precision.autocast(images.device):
        losses, _ = state.network(images, batch.targets)
    state.scaler.scale(sum(losses.values())).backward()
    _optimizer_step(state, guard, [batch], [losses], [])
    return losses


@pytest.fixture(scope="module")
def trained(tiny_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "run"
    train(_on(tiny_experiment, "cuda", dtype="float16", memory_format="channels_last"), folder)
    return folder


def test_fold__gives_the_weights_it_gives_on_a_cpu():
    torch.manual_seed(0)
    model = expand(timm.create_model("test_resnet", features_only=True), "dbb", where="3x3").eval()
    x = torch.randn(1, 3, 64, 64)
    folded, _ = fold(model, x)
    folded_there, report = fold(model.cuda(), x.cuda())
    assert report.norms_after == 0
    there = folded_there.state_dict()
    assert {t.device.type for t in there.values()} == {"cuda"}
    for name, weight in folded.state_dict().items():
        assert torch.equal(weight, there[name].cpu()), name
    with torch.inference_mode():
        for one, two in zip(folded(x), folded_there(x.cuda()), strict=True):
            torch.testing.assert_close(one, two.cpu(), rtol=1e-3, atol=1e-4)


def test_postprocess__selects_what_it_selects_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    # Apart by more than the rounding of a sigmoid, which decides on the order of near ties.
    logits = torch.linspace(-4, 3, 3 * 700)[torch.randperm(3 * 700, generator=generator)]
    corners = 300 * torch.rand(700, 2, generator=generator)
    sides = 5 + 120 * torch.rand(700, 2, generator=generator)
    boxes = torch.cat([corners, corners + sides], dim=1)
    limits = ((320, 320), 0.05, 1000, 0.6, 100)
    expected = postprocess(logits.view(700, 3), boxes, *limits)
    found = postprocess(logits.view(700, 3).cuda(), boxes.cuda(), *limits)
    assert 0 < len(expected.scores) < 1000
    assert torch.equal(expected.labels, found.labels.cpu())
    assert torch.equal(expected.boxes, found.boxes.cpu())
    torch.testing.assert_close(expected.scores, found.scores.cpu())


def test_uniform_match__matches_what_it_matches_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    corners = 300 * torch.rand(3, 400, 2, generator=generator)
    pred = torch.cat([corners, corners + 60 * torch.rand(3, 400, 2, generator=generator)], dim=2)
    anchors = torch.cat([corners[0].round(), corners[0].round() + 32], dim=1)
    truth, valid = pred[:, :7] + 3, torch.rand(3, 7, generator=generator) < 0.8
    expected = uniform_match(anchors, pred, truth, valid)
    found = uniform_match(*(x.cuda() for x in (anchors, pred, truth, valid)))
    assert torch.equal(expected.assigned, found.assigned.cpu())
    assert torch.equal(expected.positive & valid[:, expected.gt_idxs], found.positive.cpu())


def test_a_training_step_has_the_losses_and_gradients_of_a_cpu(tiny_experiment):
    gradients, losses = [], []
    for device in ("cpu", "cuda"):
        state, loader, *_ = prepare(_on(tiny_experiment, device), torch.device(device))
        batch = next(iter(loader)).to(device)
        of_batch, _ = state.network.train()(batch.images, batch.targets)
        sum(of_batch.values()).backward()
        losses.append({name: loss.item() for name, loss in of_batch.items()})
        named = state.detector.named_parameters()
        gradients.append({name: p.grad.cpu() for name, p in named if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        apart = (expected - gradients[1][name]).norm() / expected.norm().clamp(min=1e-6)
        assert apart < 0.01, name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step_never_waits_for_the_gpu(experiment, tmp_path, dtype, optimizer):
    optim = replace(experiment.optim, optimizer=optimizer, clip_norm=1.0)
    experiment = replace(_on(experiment, "cuda", dtype=dtype), optim=optim)
    state, loader, *_ = prepare(experiment, torch.device("cuda"))
    guard = NonFiniteGuard(state, tmp_path)
    batch = next(iter(loader)).to("cuda")
    for _ in range(2):  # The first steps choose algorithms.
        _step(state, batch, guard)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(state, batch, guard)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    guard.settle()
    assert state.bad_in_a_row == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_with_a_loss_that_is_not_finite_is_skipped_on_the_gpu(
    experiment, tmp_path, monkeypatch, dtype, optimizer
):
    forward, before = Detector.forward, []

    def spoilt(self, images, targets=None):
        if targets is not None:
            before.append([p.detach().clone() for p in self.parameters()])
            if len(before) in (1, 5, 6):  # of two epochs of three
                images = images.float() * torch.nan
        return forward(self, images, targets)

    monkeypatch.setattr(Detector, "forward", spoilt)
    experiment = replace(experiment, optim=replace(experiment.optim, optimizer=optimizer))
    train(_on(experiment, "cuda", dtype=dtype), tmp_path / "run")
    same = [all(map(torch.equal, one, two)) for one, two in pairwise(before)]
    if dtype == "float16":  # Its first loss scales may be too high.
        same[1:4] = [False] * 3
    assert same == [True, False, False, False, True]
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    tensors = [*content["model"].values(), *content["raw_model"].values()]
    for state in content["optimizer"]["state"].values():
        tensors += state.values()
    assert all(t.isfinite().all() for t in tensors if t is not None and t.is_floating_point())
    assert len(list((tmp_path / "run").glob("bad_step_*.pt"))) == 3


def test_a_loader_for_a_gpu_pins_the_batches_it_gives_a_cpu(tiny_experiment):
    data = replace(tiny_experiment.data, workers=1)
    dataset = DetectionDataset(load_split(data, data.train_split))
    torch.zeros(1, device="cuda")  # Its processes are forked from one that uses the GPU.
    batches = zip(
        make_train_loader(dataset, data, 8),
        make_train_loader(dataset, data, 8, device="cuda"),
        strict=True,
    )
    for on_cpu, pinned in batches:
        assert pinned.images.is_pinned()
        there = pinned.to("cuda")
        assert there.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(there.images.cpu(), on_cpu.images)
        for one, two in zip(on_cpu.targets, there.targets, strict=True):
            assert all(torch.equal(one[name], two[name].cpu()) for name in one)


def test_seed_globally__seeds_the_gpu():
    def draw(*key):
        seed_globally(torch.device("cuda"), *key)
        return nn.functional.dropout(torch.ones(100, device="cuda"))

    assert torch.equal(draw("step", 1), draw("step", 1))
    assert not torch.equal(draw("step", 1), draw("step", 2))


def test_a_checkpoint_of_a_gpu_finds_the_same_on_a_cpu(trained, experiment):
    on_cpu = load_checkpoint(trained / "best.pt")
    on_gpu = load_checkpoint(trained / "best.pt", device="cuda")
    content = on_cpu.content
    assert content["dtype"] == "float16"
    assert content["scaler"]
    data = replace(experiment.data, workers=0)
    batch = next(iter(make_train_loader(DetectionDataset(load_split(data, "test")), data, 8)))
    with torch.inference_mode():
        for form in (lambda d: d, lambda d: fold_detector(d)[0]):
            one, two = (form(x.detector) for x in (on_cpu, on_gpu))
            outputs = zip(one(batch.images), two(batch.images.cuda()), strict=True)
            for expected, found in outputs:
                torch.testing.assert_close(expected, found.cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_run_of_a_gpu_can_be_resumed(trained, tiny_experiment, tmp_path, device):
    dtype = "float16" if device == "cuda" else "float32"
    longer = _on(tiny_experiment, device, epochs=3, dtype=dtype)
    train(longer, tmp_path / device, resume_from=trained / "last.pt")
    content = read_checkpoint(tmp_path / device / "last.pt")
    assert (content["epoch"], content["steps_done"]) == (3, 9)
    assert all(v.isfinite().all() for v in content["model"].values())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_time_checkpoint__times_both_forms_on_a_gpu(trained, precision):
    checkpoint = trained / "best.pt"
    lines = time_checkpoint(checkpoint, images=8, precision=precision, device="cuda")
    told = "\n".join(lines)
    assert "CUDA events" in told
    for form in ("folded", "unfolded"):
        assert f"{form} ({precision}, channels_last)" in told


def test_a_compiled_detector_computes_what_it_computes_uncompiled(tiny_experiment):
    torch.manual_seed(0)
    detector = build_detector(tiny_experiment.model, ("a", "b")).eval().cuda()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device="cuda")
    with torch.inference_mode():
        expected = detector(images)
        detector.compile()
        for one, two in zip(expected, detector(images), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
