"""Frozen stages folded in training steps: the same losses and gradients, nothing else changed."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tinydet.experiment_file import override
from tinydet.training import folded_stages
from tinydet.training.folded_stages import fold_frozen_stages
from tinydet.training.loop import prepare
from tinydet.training.precision import Precision
from tinydet.training.resume import restore

from .small_detectors import assert_same_step, batch, detector_of, losses_of

# One of each wrapper, layout and kind of frozen part, with whether a norm goes there.
NETWORKS = [
    ("test_resnet", {}, True),
    ("tf_efficientnet_lite0", {}, True),
    ("tf_efficientnet_lite0", {"feature": "P4", "freeze_stages": 3}, True),
    ("repvgg_a0", {}, True),
    ("shufflenetv2_x0_5", {"freeze_stages": 3}, True),
    ("mobilenetv3_small_050", {"feature": "C5", "freeze_stages": 5}, True),
    ("convnext_atto", {}, False),
    ("mambaout_femto", {"feature": "P4", "freeze_stages": 1}, False),
    ("vit_tiny_patch16_224", {"freeze_stages": 1}, False),
]


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("name", "changes", "has_norms"), NETWORKS)
def test_a_step_has_the_losses_and_gradients_of_the_stages_as_they_are(
    name, changes, has_norms, memory_format
):
    plain = detector_of(backbone=name, **changes)
    folded = copy.deepcopy(plain)
    Precision("float32", memory_format, "").prepare(folded)
    kinds = {type(m) for m in folded.modules()} - {type(m) for m in plain.modules()}
    assert any(issubclass(kind, folded_stages._Folded) for kind in kinds)
    parts = [m.__dict__["folded"] for m in folded.modules() if "folded" in m.__dict__]
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    left = [m for p in parts for m in p.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not (has_norms and left)
    assert_same_step(plain, folded)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "repvgg_a0"])
def test_weights_and_evaluation_stay_bit_by_bit(name):
    plain = detector_of(backbone=name)
    folded = copy.deepcopy(plain)
    fold_frozen_stages(folded, torch.contiguous_format)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, folded.state_dict().values(), plain.state_dict().values()))
    assert [n for n, _ in folded.named_modules()] == [n for n, _ in plain.named_modules()]
    with torch.no_grad():
        for one, two in zip(plain.eval()(batch()[0]), folded.eval()(batch()[0]), strict=True):
            assert torch.equal(one, two)
    twin = copy.deepcopy(folded).train()
    assert losses_of(twin)["loss_cls"] == losses_of(folded.train())["loss_cls"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "shufflenetv2_x0_5", "rexnet_100"])
def test_other_weights_are_folded_when_they_are_restored(tiny_experiment, backbone, dtype):
    settings = ["model.freeze_stages=2", "train.ema_decay=0", f"train.dtype={dtype}"]
    settings.append(f"model.backbone={backbone}")
    experiment = override(tiny_experiment, [*settings, "train.memory_format=channels_last"])
    cpu = torch.device("cpu")
    state, *_ = prepare(experiment, cpu)
    other, *_ = prepare(override(experiment, ["train.seed=1"]), cpu)

    def loss(of):
        with of.precision.autocast(cpu):
            return losses_of(of.detector)["loss_cls"]

    assert loss(state) != loss(other)
    restore(state, copy.deepcopy(other.checkpoint()), Path("last.pt"))
    assert loss(state) == loss(other)
    restore(state, copy.deepcopy(other.checkpoint()), Path("last.pt"))
    assert loss(state) == loss(other)


def test_what_cannot_be_folded_runs_as_it_is(monkeypatch, caplog):
    detector = detector_of()
    expected = losses_of(copy.deepcopy(detector))

    def fold(*_):
        raise ValueError("the folded network computes another function\nand more")

    monkeypatch.setattr(folded_stages, "fold", fold)
    with caplog.at_level("INFO", logger="tinydet"):
        fold_frozen_stages(detector, torch.contiguous_format)
    assert caplog.messages == [
        "frozen stages are not folded: the folded network computes another function"
    ]
    assert losses_of(detector) == expected
    assert not any(isinstance(m, folded_stages._Folded) for m in detector.modules())


def test_a_folded_stage_that_computes_something_else_is_found(monkeypatch, caplog):
    detector = detector_of()
    right = folded_stages.fold

    def fold(*arguments):
        folded, report = right(*arguments)
        with torch.no_grad():
            next(folded.parameters()).mul_(1.5)
        return folded, report

    monkeypatch.setattr(folded_stages, "fold", fold)
    with caplog.at_level("INFO", logger="tinydet"):
        fold_frozen_stages(detector, torch.contiguous_format)
    assert "their outputs differ by" in caplog.text
    assert not any(isinstance(m, folded_stages._Folded) for m in detector.modules())


@pytest.mark.slow
def test_compiled_stages_are_folded_too():
    plain = detector_of()
    folded = copy.deepcopy(plain)
    fold_frozen_stages(folded, torch.contiguous_format)
    folded.backbone.compile()
    one, two = losses_of(plain), losses_of(folded)
    for key, loss in one.items():
        torch.testing.assert_close(two[key], loss, rtol=1e-4, atol=1e-5)
