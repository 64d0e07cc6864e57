"""Registered variants: one idea on a timm model, everything else as timm has it."""

import pytest
import timm
import torch

import tinydet.backbones  # noqa: F401
from tinydet.layers import AconC, CoordinateAttention
from tinydet.reparam.expand import ExpandedConv2d

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


@pytest.mark.parametrize(
    ("name", "millions"), [("rexnet_100", 4.80), ("mobilenetv3_large_100", 5.48)]
)
def test_timms_own_models_have_the_published_number_of_parameters(name, millions):
    model = timm.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", VARIANTS)
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


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_takes_timms_options(name):
    options = {"features_only": True, "out_indices": (2, 4), "output_stride": 16, "in_chans": 1}
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        maps = model(torch.rand(2, 1, 64, 64))
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 8), (4, 4)]
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
