"""Frozen norms inside convs in training steps: the same losses and gradients, nothing else."""

import copy

import pytest
import torch
from timm.layers import FrozenBatchNormAct2d
from torchvision.ops.misc import FrozenBatchNorm2d

from tinydet.experiment_file import override
from tinydet.training import fused_norms
from tinydet.training.fused_norms import fuse_frozen_norms, undo_fused_norms
from tinydet.training.loop import prepare
from tinydet.training.precision import Precision
from tinydet.training.resume import restore

from .small_detectors import assert_same_step, batch, detector_of, losses_of

# Norms with and without an activation; TensorFlow's padding; a conv with a bias before its norm;
# strided 1x1 convs of few channels; norms in front of convs; branches and activations that are
# added.
NETWORKS = [
    ("test_resnet", {}),
    ("tf_efficientnet_lite0", {"feature": "P4"}),
    ("mobilenetv3_small_050", {"feature": "C5"}),
    ("regnetx_002", {}),
    ("shufflenetv2_x0_5", {}),
    ("densenet121", {}),
    ("darknet17", {"feature": "C5"}),
    ("test_resnet", {"expand": "repvgg", "expand_where": "layer3"}),
    ("test_resnet", {"expand": "repvgg", "expand_where": "layer3", "expand_online": True}),
    ("test_resnet", {"activation": "acon-c", "activation_where": "layer2 layer3"}),
]


def fused_of(detector):
    return [m for m in detector.modules() if isinstance(m, fused_norms._Computed)]


def frozen_of(detector):
    kinds = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
    return [m for m in detector.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("stages", [0, 2])
@pytest.mark.parametrize(("name", "changes"), NETWORKS)
def test_a_step_has_the_losses_and_gradients_of_norms_as_they_are(name, changes, stages):
    plain = detector_of(backbone=name, freeze_norms=True, freeze_stages=stages, **changes)
    fused = copy.deepcopy(plain)
    Precision("float32", "channels_last", "").prepare(fused)
    assert fused_of(fused)
    assert_same_step(plain, fused)


@pytest.mark.parametrize(
    ("name", "left"),
    [("test_resnet", 0), ("tf_efficientnet_lite0", 0), ("densenet121", 44), ("repvgg_a0", 59)],
)
def test_norms_behind_convs_are_fused_and_others_are_not(name, left):
    detector = detector_of(backbone=name, freeze_norms=True, freeze_stages=0)
    fuse_frozen_norms(detector)
    assert len(frozen_of(detector)) - len(fused_of(detector)) == left


def test_norms_that_learn_are_left_alone():
    detector = detector_of(freeze_stages=0)
    kinds = [type(module) for module in detector.modules()]
    fuse_frozen_norms(detector)
    assert [type(module) for module in detector.modules()] == kinds


@pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0"])
def test_weights_and_evaluation_stay_bit_by_bit(name):
    plain = detector_of(backbone=name, freeze_norms=True)
    fused = copy.deepcopy(plain)
    fuse_frozen_norms(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, fused.state_dict().values(), plain.state_dict().values()))
    parameters = zip(fused.named_parameters(), plain.named_parameters(), strict=True)
    assert all(one == two and torch.equal(p, q) for (one, p), (two, q) in parameters)
    with torch.no_grad():
        for one, two in zip(plain.eval()(batch()[0]), fused.eval()(batch()[0]), strict=True):
            assert torch.equal(one, two)
    twin = copy.deepcopy(fused).train()
    assert losses_of(twin)["loss_cls"] == losses_of(fused.train())["loss_cls"]
    undo_fused_norms(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    assert not any("norm_scale" in vars(m) or "own_class" in vars(m) for m in fused.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "rexnet_100"])
def test_other_norms_are_fused_when_they_are_restored(tiny_experiment, backbone, dtype):
    settings = ["model.freeze_norms=true", "train.ema_decay=0", f"train.dtype={dtype}"]
    settings += [f"model.backbone={backbone}", "train.memory_format=channels_last"]
    experiment, cpu = override(tiny_experiment, settings), torch.device("cpu")
    state, *_ = prepare(experiment, cpu)
    other, *_ = prepare(override(experiment, ["train.seed=1"]), cpu)
    for norm in frozen_of(other.detector):
        norm.running_var.uniform_(0.5, 1.5)

    def loss(of):
        with of.precision.autocast(cpu):
            return losses_of(of.detector)["loss_cls"]

    restore(state, copy.deepcopy(other.checkpoint()), tiny_experiment.name)
    other.precision.prepare(other.detector)  # Its own convs have the norms of before.
    assert fused_of(state.detector)
    assert loss(state) == loss(other)


def test_what_would_be_something_else_stays_as_it_is(monkeypatch, caplog):
    detector = detector_of(freeze_norms=True, freeze_stages=0)
    expected = losses_of(copy.deepcopy(detector))
    right = fused_norms.scale_and_shift
    monkeypatch.setattr(
        fused_norms, "scale_and_shift", lambda norm: tuple(1.5 * t for t in right(norm))
    )
    with caplog.at_level("INFO", logger="tinydet"):
        fuse_frozen_norms(detector)
    assert "frozen norms stay as they are: their outputs differ by" in caplog.text
    assert not fused_of(detector)
    assert losses_of(detector) == expected


@pytest.mark.slow
def test_compiled_convs_compute_norms_too():
    plain = detector_of(freeze_norms=True, freeze_stages=0)
    fused = copy.deepcopy(plain)
    fuse_frozen_norms(fused)
    fused.backbone.compile()
    assert_same_step(plain, fused)
