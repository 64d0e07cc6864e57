"""Modifications of a backbone: all together, each alone, errors, and the registered variants."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from tinydet.backbones.modifications import apply_modifications
from tinydet.config import ConfigError, Model
from tinydet.layers import AconC, CoordinateAttention
from tinydet.reparam import expanded_names, fold
from tinydet.reparam.expand import ExpandedConv2d
from tinydet.yolof.build import build_detector

PLAIN = Model(backbone="test_efficientnet")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", features_only=True, out_indices=(3,)).eval()


def test_no_idea_is_the_backbone_itself(backbone):
    assert apply_modifications(backbone, PLAIN) is backbone


def test_all_together_begin_as_the_same_function_and_fold(backbone):
    config = replace(PLAIN, activation="acon-c", attention="coord", attention_place="stage")
    config = replace(config, expand="dbb", expand_where="3x3 depthwise")
    changed = apply_modifications(backbone, config).eval()
    kinds = {type(module) for module in changed.modules()}
    assert {AconC, CoordinateAttention} <= kinds
    assert nn.SiLU not in kinds
    assert expanded_names(changed)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        # SiLU is an ACON, attention and branches begin as nothing.
        torch.testing.assert_close(changed(x)[0], backbone(x)[0], rtol=1e-4, atol=1e-5)
    kept = {k: v for k, v in changed.state_dict().items() if k in backbone.state_dict()}
    assert kept.keys() == backbone.state_dict().keys()
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in kept.items())
    folded, report = fold(changed, x)
    assert report.branches_after == 0
    with torch.no_grad():
        torch.testing.assert_close(folded(x)[0], changed(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "where"), [("test_efficientnet", "blocks.3"), ("mambaout_femto", "stages_2")]
)
@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "acon-c"},
        {"attention": "coord", "attention_place": "stage"},
        {"expand": "repvgg"},
    ],
    ids=["activation", "attention", "expand"],
)
def test_places_have_the_same_names_for_every_feature(name, where, changes):
    added = {}
    # Both maps of P4 become one in a module around timm's, and in one more where channels are last.
    for feature, prefix in (("C4", ""), ("P4", "body.")):
        plain = Model(backbone=name, weights="random", feature=feature, freeze_stages=1)
        config = replace(plain, **changes, **{f"{next(iter(changes))}_where": where})
        before, after = (set(build_detector(c, ["a"]).state_dict()) for c in (plain, config))
        added[feature] = {key.replace(f"backbone.{prefix}", "backbone.") for key in after - before}
    assert added["C4"] == added["P4"] != set()
    assert all(where in key for key in added["P4"])


def test_frozen_norms_keep_everything_while_the_convs_learn():
    model = timm.create_model("test_resnet", features_only=True, out_indices=(2,))
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)[0]
    frozen = apply_modifications(model, Model(backbone="test_resnet", freeze_norms=True)).train()
    found = frozen(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    norms = {name for name, m in frozen.named_modules() if "Frozen" in type(m).__name__}
    assert len(norms) == 8  # three in the stem, two stages of two, one shortcut
    trained = [name for name, p in frozen.named_parameters() if p.grad is not None]
    assert trained
    assert not [name for name in trained if name.rpartition(".")[0] in norms]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"activation_where": "blocks.1"},
            "model.activation_where=blocks.1: has no effect without model.activation, e.g. ",
        ),
        (
            {"attention_where": "blocks.1"},
            "model.attention_where=blocks.1: has no effect without model.attention, e.g. ",
        ),
        ({"expand_where": "3x3"}, "model.expand_where=3x3: has no effect without model.expand"),
        ({"activation": "acon-c", "activation_where": "block.1"}, "did you mean blocks.1"),
        (
            {"attention": "coord", "attention_place": "stage", "attention_where": "block.1"},
            "did you mean blocks.1",
        ),
    ],
)
def test_errors_are_one_line(backbone, changes, words):
    with pytest.raises(ConfigError) as error:
        apply_modifications(backbone, replace(PLAIN, **changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# variant -> timm's model, the new layer, how many of them
VARIANTS = {
    "rexnet_100_acon": ("rexnet_100", AconC),
    "rexnet_100_coordatt": ("rexnet_100", CoordinateAttention),
    "mobilenetv3_large_100_coordatt": ("mobilenetv3_large_100", CoordinateAttention),
    "repvgg_a0_dbb": ("repvgg_a0", ExpandedConv2d),
}
# ReXNet-1.0 has 17 SiLU, 16 ReLU6 and, in its SE, 13 ReLU layers; SE from its third stage on, in 13
# of 16 blocks, MobileNetV3-L in 8 of 15 (the paper's table 1); RepVGG-A0 a 3x3 conv in each of its
# 1 + 2 + 4 + 14 + 1 blocks.
COUNTS = {
    "rexnet_100_acon": 46,
    "rexnet_100_coordatt": 13,
    "mobilenetv3_large_100_coordatt": 8,
    "repvgg_a0_dbb": 22,
}
TESTED = [
    "rexnet_100_acon",
    *(pytest.param(name, marks=pytest.mark.slow) for name in list(VARIANTS)[1:]),
]


@pytest.mark.parametrize(
    ("name", "millions"), [("rexnet_100", 4.80), ("mobilenetv3_large_100", 5.48)]
)
def test_timms_own_models_have_the_published_number_of_parameters(name, millions):
    model = timm.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", TESTED)
def test_variant_is_the_timm_model_with_one_idea(name):
    base_name, layer = VARIANTS[name]
    assert name in timm.list_models()
    base, variant = timm.create_model(base_name), timm.create_model(name)
    found = [n for n, m in variant.named_modules() if isinstance(m, layer)]
    assert len(found) == COUNTS[name]
    shared = base.state_dict()
    # Attention takes the place of SE and of its names; nothing else loses its name.
    gone = shared.keys() - variant.state_dict().keys()
    assert all(layer is CoordinateAttention and ".se." in key for key in gone)


@pytest.mark.parametrize("name", TESTED)
def test_variant_takes_timms_options(name):
    options = {"features_only": True, "out_indices": (2, 4), "output_stride": 16, "in_chans": 1}
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        maps = model(torch.rand(2, 1, 64, 64))
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 8), (4, 4)]
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
