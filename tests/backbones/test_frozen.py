"""Fixed first stages: what stays, what learns, and where the backward pass ends."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tinydet.backbones.frozen import freeze_stages
from tinydet.config import ConfigError, Model, Optim
from tinydet.deployment.fold_checkpoint import fold_detector
from tinydet.experiment_file import load_experiment
from tinydet.training.checkpoint import build_unloaded
from tinydet.training.distributed import sync_batchnorm
from tinydet.training.optim import make_optimizer, make_schedule
from tinydet.yolof.build import build_detector

RECIPE = Path(__file__).resolve().parents[2] / "experiments" / "rexnet_yolof.py"
SMALL = Model(
    backbone="test_resnet",
    weights="random",
    feature="C4",
    encoder_channels=16,
    encoder_mid_channels=8,
    dilations=(2,),
    cls_convs=1,
    reg_convs=1,
)
# What runs before the n-th feature map, read off timm's and our own model files: one for each kind
# of wrapper (list, getter, own class), layout and norm, and the project's own backbones.
STAGES = [
    ("test_resnet", 1, "conv1 bn1"),
    pytest.param(*("resnet18", 2, "conv1 bn1 layer1"), marks=pytest.mark.slow),
    ("tf_efficientnet_lite0", 2, "conv_stem bn1 blocks.0 blocks.1"),
    ("mobilenetv3_small_050", 3, "conv_stem bn1 blocks.0 blocks.1"),
    pytest.param(
        *("rexnet_100", 2, "stem features_0 features_1 features_2"), marks=pytest.mark.slow
    ),
    ("convnext_atto", 1, "stem_0 stem_1 stages_0"),
    ("mambaout_femto", 1, "body.stem body.stages_0"),
    (
        "vit_tiny_patch16_224",
        1,
        "model.cls_token model.pos_embed model.patch_embed model.blocks.0",
    ),
    ("shufflenetv2_x0_5", 3, "conv1 stage2"),
    ("yolov5n", 2, "stem stages_0"),
    pytest.param(*("repvgg_a0", 2, "stem stages_0"), marks=pytest.mark.slow),
]


def _inside(name, where):
    return any(name == part or name.startswith(f"{part}.") for part in where.split())


def _leaves(tensor):
    """Return the ids of the tensors whose gradient a backward pass from here would compute."""
    waiting, seen, leaves = [tensor.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return leaves


def _detector(**changes):
    return build_detector(replace(SMALL, **changes), ("a", "b"))


@pytest.mark.parametrize(("name", "stages", "where"), STAGES)
def test_the_first_stages_stay_while_all_else_learns(name, stages, where):
    torch.manual_seed(0)
    detector = _detector(backbone=name, freeze_stages=stages)
    backbone = detector.train().backbone
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        (feature,) = backbone(torch.rand(2, 3, 64, 64))
        loss = (feature * torch.randn_like(feature)).mean()
        assert _leaves(loss) == {id(p) for p in backbone.parameters() if p.requires_grad}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {key for key, value in backbone.state_dict().items() if not value.equal(before[key])}
    fixed = {key for key in before if _inside(key, where)}
    assert fixed
    assert not moved & fixed
    # A bias that a norm follows has a gradient of zero.
    learns = [key for key, p in backbone.named_parameters() if p.ndim > 1 and key not in fixed]
    counts = [key for key in before if key.endswith("running_mean") and key not in fixed]
    assert not {*learns, *counts} - moved


def test_the_map_behind_the_fixed_stages_has_no_graph():
    detector = _detector(freeze_stages=2)
    seen = []
    detector.backbone.layer2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    losses, _ = detector(
        torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        [{"boxes": torch.tensor([[8.0, 8, 50, 50]]), "labels": torch.tensor([0])}] * 2,
    )
    assert not seen[0].requires_grad
    assert _leaves(sum(losses.values())) == {
        id(p) for p in detector.parameters() if p.requires_grad
    }


def test_fixed_modules_are_in_eval_mode_through_train():
    detector = _detector(freeze_stages=2)
    synced = sync_batchnorm(copy.deepcopy(detector), torch.device("cuda"))
    assert isinstance(synced.backbone.bn1, nn.SyncBatchNorm)
    for form in (detector, copy.deepcopy(detector), detector.eval().train(), synced.train()):
        modes = {name: m.training for name, m in form.backbone.named_modules() if name}
        fixed = {name for name in modes if _inside(name, "conv1 bn1 act1 maxpool layer1")}
        assert len(fixed) > 10
        assert {name for name, training in modes.items() if not training} == fixed
    assert not any(m.training for m in detector.eval().modules())


def test_the_whole_backbone_can_be_fixed():
    detector = _detector(freeze_stages=4).train()
    assert not any(p.requires_grad for p in detector.backbone.parameters())
    assert not any(m.training for name, m in detector.backbone.named_modules() if name)
    assert all(p.requires_grad for p in detector.encoder.parameters())
    optim = Optim()
    optimizer = make_optimizer(detector, optim, make_schedule(optim, 16, 100))
    steps = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert steps == {id(p) for p in detector.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0"])
def test_what_is_drawn_and_named_is_the_same_as_without(name):
    states = []
    for stages in (0, 1, 3):
        torch.manual_seed(3)
        states.append(_detector(backbone=name, freeze_stages=stages).state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(value.equal(states[0][key]) for key, value in state.items())


def test_with_frozen_norms_other_stages_have_fixed_norms_alone():
    detector = _detector(freeze_stages=2, freeze_norms=True).train()
    learns = {name for name, p in detector.backbone.named_parameters() if p.requires_grad}
    convs = {name for name, m in detector.backbone.named_modules() if isinstance(m, nn.Conv2d)}
    assert learns == {f"{name}.weight" for name in convs if _inside(name, "layer2 layer3")}
    assert not any(m.training for m in detector.backbone.layer1.modules())


@pytest.mark.parametrize(
    ("idea", "where"),
    [
        ({"activation": "acon-c"}, {"activation_where": "blocks.2 blocks.3"}),
        ({"attention": "coord"}, {"attention_where": "blocks.3"}),
        pytest.param(
            *({"expand": "dbb"}, {"expand_where": "3x3 5x5 blocks.2 blocks.3 blocks.4"}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ideas_have_to_name_places_that_learn(idea, where):
    changes = {"backbone": "tf_efficientnet_lite0", "freeze_stages": 2, **idea}
    with pytest.raises(ConfigError) as error:
        _detector(**changes)
    assert "blocks.2 blocks.3 blocks.4" in str(error.value)
    assert "\n" not in str(error.value)
    detector = _detector(**changes, **where).train()
    fixed = [
        p
        for name, p in detector.backbone.named_parameters()
        if _inside(name, "conv_stem bn1 blocks.0 blocks.1")
    ]
    loss = detector.backbone(torch.rand(2, 3, 64, 64))[0].sum()
    assert not _leaves(loss) & {id(p) for p in fixed}


def test_it_folds_and_is_built_again_from_a_checkpoint():
    torch.manual_seed(0)
    config = replace(SMALL, freeze_stages=2)
    detector = _detector(freeze_stages=2).eval()
    again = build_unloaded(config, ("a", "b"))
    again.load_state_dict(detector.state_dict())
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in detector.named_parameters() if p.requires_grad
    }
    folded, report = fold_detector(detector)
    assert report.norms_after == 0
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        for mine, theirs in zip(folded(images), again.eval()(images), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert folded.train().training


def test_processes_train_it_together(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        detector = _detector(freeze_stages=2)
        network = DistributedDataParallel(detector, static_graph=True).train()
        assert not detector.backbone.layer1.training
        for _ in range(2):
            sum(output.sum() for output in network(torch.zeros(2, 3, 64, 64))).backward()
    finally:
        torch.distributed.destroy_process_group()
    got = {name for name, p in detector.named_parameters() if p.grad is not None}
    assert got == {name for name, p in detector.named_parameters() if p.requires_grad}


class _Network(nn.Module):
    def __init__(self, out_indices=(1,)):
        super().__init__()
        self.out_indices = out_indices
        self.stem = nn.BatchNorm2d(3)
        self.stem.register_parameter("unused", nn.Parameter(torch.zeros(3)))
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        first = self.stem(x * self.scale)
        maps = (first, self.last(first))
        return [maps[index] for index in self.out_indices]


@pytest.mark.parametrize(
    ("name", "stages", "where"),
    [
        ("tf_efficientnet_lite0", 2, "conv_stem bn1 blocks.0 blocks.1"),
        ("mambaout_femto", 1, "stem stages_0"),
        ("test_resnet", 5, "conv1 bn1 layer1 layer2 layer3 layer4"),
    ],
)
def test_of_two_maps_the_shallow_stages_are_fixed(name, stages, where):
    torch.manual_seed(0)
    detector = _detector(backbone=name, feature="P4", freeze_stages=stages)
    prefix = "body.body." if name == "mambaout_femto" else "body."
    fixed = " ".join(prefix + part for part in where.split())
    for part, parameter in detector.backbone.named_parameters():
        assert parameter.requires_grad != _inside(part, fixed), part
    detector.train()
    for part, module in detector.backbone.named_modules():
        if [*module.buffers(recurse=False)]:
            assert module.training != _inside(part, fixed), part


def test_weights_outside_any_module_and_unused_ones_are_fixed_too():
    network = _Network()
    assert freeze_stages(network, _Network, 1, 1) == ("stem",)
    learns = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learns == {"last.weight", "last.bias"}


class _NoGradients(nn.Module):
    def forward(self, x):
        return [x.detach()]


def test_what_cannot_be_fixed_is_said_in_one_line():
    with pytest.raises(ConfigError, match=r"freeze_stages=5: .* stages 1 to 4") as error:
        _detector(freeze_stages=5)
    assert "\n" not in str(error.value)
    network = _NoGradients()
    with pytest.raises(ConfigError, match=r"freeze_stages=1: .*another backbone") as error:
        freeze_stages(network, lambda **_: network, 1, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["-1", "6", "1.5"])
def test_a_number_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match=r"model\.freeze_stages"):
        load_experiment(RECIPE, [f"model.freeze_stages={value}"])


def test_modules_without_a_name_in_the_fixed_ones_are_left_alone():
    # Folding takes modules away; the rest still changes its mode.
    detector = _detector(freeze_stages=1)
    detector.backbone.bn1 = nn.Identity()
    del detector.backbone["act1"]
    assert detector.train().backbone.layer1.training
