"""Published weights load, fold, and leave no unused tensor."""

from __future__ import annotations

import pickle
import re

import pytest
import timm
import torch
from timm.models import fastvit
from torch import nn

from tinydet.reparam import fold

from .reference_blocks import assert_same
from .small_networks import check_nothing_unused

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _conv_norm_names(name):
    return {f"{name}.conv.weight", *(f"{name}.bn.{n}" for n in _NORM)}


def _repvgg_a0_names():
    names = {"head.fc.weight", "head.fc.bias"}
    blocks = ["stem"] + [f"stages.{i}.{j}" for i, d in enumerate((2, 4, 14, 1)) for j in range(d)]
    for block in blocks:
        names |= _conv_norm_names(f"{block}.conv_kxk") | _conv_norm_names(f"{block}.conv_1x1")
        if block != "stem" and not block.endswith(".0"):
            names |= {f"{block}.identity.{n}" for n in _NORM}
    return names


def _mobileone_s0_names():
    names = {"head.fc.weight", "head.fc.bias"}
    names |= _conv_norm_names("stem.conv_kxk.0") | _conv_norm_names("stem.conv_scale")
    for stage, depth in enumerate((2, 8, 10, 1)):
        for i in range(2 * depth):  # depthwise 3x3, then 1x1
            block = f"stages.{stage}.{i}"
            for copy_ in range(4):
                names |= _conv_norm_names(f"{block}.conv_kxk.{copy_}")
            if i % 2 == 0:
                names |= _conv_norm_names(f"{block}.conv_scale")
            # The first block halves the image, the second widens; in S0's first stage it does not.
            if i > 1 or (stage, i) == (0, 1):
                names |= {f"{block}.identity.{n}" for n in _NORM}
    return names


def _as_published_by_fastvits_authors(state):
    """Give timm's FastViT weights the names of the original repository, MobileOne's among them."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("stem", "patch_embed").replace("final_conv", "conv_exp")
        key = key.replace("conv_kxk", "rbr_conv").replace("conv_scale", "rbr_scale")
        key = key.replace("identity", "rbr_skip").replace("large_conv", "lkb_origin")
        key = key.replace("mlp", "convffn").replace("head.fc.", "head.")
        key = key.replace("se.fc1", "se.reduce").replace("se.fc2", "se.expand")
        key = key.replace("layer_scale.gamma", "layer_scale")
        key = re.sub(r"stages\.(\d)\.blocks", lambda m: f"network.{2 * int(m[1])}", key)
        key = re.sub(r"stages\.(\d)\.downsample", lambda m: f"network.{2 * int(m[1]) - 1}", key)
        renamed[key] = value
    return renamed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published"), [("repvgg_a0", _repvgg_a0_names), ("mobileone_s0", _mobileone_s0_names)]
)
def test_published_names_load_and_nothing_unused_is_left(name, published, randomise):
    trained = randomise(timm.create_model(name), seed=3).eval()
    assert set(trained.state_dict()) == published()
    folded, report = _loaded_and_folded(name, trained, dict(trained.state_dict()))
    check_nothing_unused(folded, torch.zeros(1, 3, 64, 64))
    layers = [m for m in folded.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    size = sum(m.weight.numel() + m.bias.numel() for m in layers)
    assert sum(t.numel() for t in folded.state_dict().values()) == size == report.params_after
    assert len(pickle.dumps(folded)) < 4 * size + 200_000


@pytest.mark.slow
def test_original_names_load_before_folding(randomise):
    # timm knows the original names of FastViT and its MobileOne blocks, and none of RepVGG's.
    trained = randomise(timm.create_model("fastvit_t8"), seed=3).eval()
    original = _as_published_by_fastvits_authors(trained.state_dict())
    assert "patch_embed.0.rbr_conv.0.conv.weight" in original
    assert "network.0.0.token_mixer.mixer.rbr_skip.weight" in original
    assert "network.1.proj.0.lkb_origin.conv.weight" in original
    renamed = fastvit.checkpoint_filter_fn(original, trained)
    _loaded_and_folded("fastvit_t8", trained, renamed)


def _loaded_and_folded(name, trained, state):
    """Load weights into a fresh model, fold it, and compare it with the one they are from."""
    fresh = timm.create_model(name)
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 64, 64)
    folded, report = fold(fresh.eval(), x)
    assert report.norms_after == 0
    with torch.no_grad():
        assert_same(trained(x), folded(x), tolerance=1e-3)  # float32, some twenty layers deep
    return folded, report
