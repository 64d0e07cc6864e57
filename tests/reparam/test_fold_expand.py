"""Expanding and folding again gives the network's own folded architecture and function.

`python tests/reparam/test_fold_expand.py` runs every block on every one of `BACKBONES` (half an
hour), or on those named; the tests run a sample.
"""

import sys
import time
from itertools import product

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from tinydet.reparam import fold
from tinydet.reparam.branches import BLOCKS
from tinydet.reparam.expand import expand, expanded_names

SAMPLE = [
    *(("test_efficientnet", block) for block in BLOCKS),
    ("test_resnet", "dbb"),
    ("test_byobnet", "acnet"),
    ("test_convnext", "large-kernel"),
    ("mobilenetv3_small_050", "repvgg"),
    ("tf_mobilenetv3_small_minimal_100", "dbb"),
    ("lcnet_050", "mobileone"),
]
BACKBONES = [
    "mobilenetv4_conv_small_035",
    "repghostnet_050",
    "mobilenetv2_035",
    "ghostnet_050",
    "mobilenetv3_small_050",
    "lcnet_050",
    "starnet_s050",
    "tf_mobilenetv3_small_minimal_100",
    "tinynet_e",
    "mnasnet_small",
    "semnasnet_050",
    "efficientvit_b0",
    "dla46_c",
    "mobilevitv2_050",
    "edgenext_xx_small",
    "hgnetv2_b0",
    "mixnet_s",
    "regnetx_002",
    "regnety_002",
    "tf_efficientnet_lite0",
    "rexnet_100",
    "inception_next_atto",
    "fastvit_t8",
    "convnext_atto",
    "mobileone_s0",
    "repvit_m0_9",
]


def _randomise(model, seed):
    """Norms of order one that let signals through many layers; a branch's are no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is None:
                continue
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(std=0.1, generator=generator)
    return model


def _architecture(model):
    """Every conv with its name and shape, and the shapes of all weights."""
    convs = {
        name: (type(m), m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    return convs, {name: tensor.shape for name, tensor in model.state_dict().items()}


def _check_same(model, expanded, x):
    """Fold both; equal architectures, and the expanded one's function."""
    plain, wanted = fold(model, x)
    folded, found = fold(expanded, x)
    convs, shapes = _architecture(plain)
    found_convs, found_shapes = _architecture(folded)
    assert found_convs == convs
    # A conv that has no bias even when folded (no norm follows, or one that stays) takes one for
    # the shift of its branches.
    extra = {name: found_shapes.pop(name) for name in found_shapes.keys() - shapes.keys()}
    assert all(name.removesuffix(".bias") in convs for name in extra)
    assert found_shapes == shapes
    assert found.macs_before > found.macs_after == wanted.macs_after
    # Also on a size that the fold has not seen.
    for images in (x, torch.randn(1, 3, x.shape[2] + 32, x.shape[3] + 64, dtype=x.dtype)):
        with torch.no_grad():
            for a, b in zip(_maps(folded, images), _maps(expanded, images), strict=True):
                assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def _maps(model, x):
    maps = model(x)
    return maps if isinstance(maps, list) else [maps]


def _check_backbone(name, block):
    torch.manual_seed(0)
    model = _randomise(timm.create_model(name, features_only=True), 1).double().eval()
    expanded = expand(model, block)
    assert expanded_names(expanded)
    _check_same(model, _randomise(expanded, 2), torch.randn(1, 3, 64, 64, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block"), SAMPLE)
def test_backbones_fold_to_their_own_architecture_and_the_same_function(name, block):
    _check_backbone(name, block)


class _Tiny(nn.Module):
    """A small classifier with every kind of conv: dynamic padding, depthwise, grouped, dilated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(Conv2dSame(3, 16, 3, 2), nn.BatchNorm2d(16), nn.Hardswish())
        self.body = nn.Sequential(
            *(nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.BatchNorm2d(16), nn.Hardswish()),
            *(nn.Conv2d(16, 24, 3, 2, 1, groups=4), nn.BatchNorm2d(24), nn.Hardswish()),
            *(nn.Conv2d(24, 24, 3, padding=2, dilation=2), nn.BatchNorm2d(24), nn.Hardswish()),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


@pytest.mark.parametrize(
    "block",
    [b if b in ("dbb", "mobileone") else pytest.param(b, marks=pytest.mark.slow) for b in BLOCKS],
)
def test_after_training_the_folded_network_is_the_trained_one(block):
    torch.manual_seed(0)
    model = _Tiny()
    expanded = expand(model, block).train()
    # Four classes that differ in what a conv sees: stripes of four directions.
    grid = torch.arange(32.0)
    planes = grid, grid[:, None], grid + grid[:, None], grid - grid[:, None]
    patterns = torch.stack([(plane * 1.6).sin().expand(32, 32) for plane in planes])[:, None]
    optimizer = torch.optim.SGD(expanded.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        labels = torch.randint(4, (16,))
        images = patterns[labels] + torch.randn(16, 3, 32, 32) / 2
        loss = nn.functional.cross_entropy(expanded(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name in expanded_names(expanded):
        for branch in expanded.get_submodule(name).branches:
            assert branch[-1].weight.abs().max() > 1e-3
    with torch.no_grad():
        trained = expanded.eval()(images)
        folded, _ = fold(expanded, images[:1])
        assert (folded(images) - trained).abs().max() <= 1e-5 * trained.abs().max()
        other = torch.randn(2, 3, 27, 38)  # dynamic padding is another one here
        torch.testing.assert_close(folded(other), expanded(other))
    plain, _ = fold(model.eval(), images[:1])
    assert _architecture(folded) == _architecture(plain)
    plain.load_state_dict(folded.state_dict())
    torch.testing.assert_close(plain(images), folded(images))


def _run_all(names):
    for name, block in product(names or BACKBONES, BLOCKS):
        start = time.perf_counter()
        try:
            _check_backbone(name, block)
            outcome = "same"
        except Exception as error:
            # Whatever is wrong with one network, the others are still tried.
            outcome = f"{type(error).__name__} {str(error).splitlines()[:1]}"
        sys.stdout.write(f"{name} {block}: {outcome}, {time.perf_counter() - start:.0f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _run_all(sys.argv[1:])
