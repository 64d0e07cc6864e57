"""Norms moved across operations that keep channels apart, against the unfolded network."""

from __future__ import annotations

import pytest
import torch
from timm.layers import AvgPool2dSame, BlurPool2d
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold

from .reference_blocks import assert_same
from .small_networks import Net, convs_of, norms_of

_SIZES = ((1, 8, 8), (2, 9, 7), (1, 17, 17), (3, 16, 10), (1, 6, 11))
_BIAS = torch.randn(8, 1, 1, dtype=torch.float64)
_ORDER = torch.tensor([2, 0, 1, 3, 7, 6, 5, 4])


def _shuffled(x, groups=4):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def _pad(mode):
    return lambda x: F.pad(x, (1, 2, 2, 1), mode=mode)


def _resized(**how):
    return lambda x: F.interpolate(x, **how)


# Each takes (B, 8, H, W); its number of output channels.
_ACROSS = {
    "crop": (lambda x: x[:, :, 1:-1, 2:], 8),
    "crop of channels": (lambda x: x[:, 2:-1], 5),
    "every second channel": (lambda x: x[:, ::2], 4),
    "negative padding": (lambda x: F.pad(x, (-1, -1, 0, -1)), 8),
    "flip": (lambda x: x.flip(3), 8),
    "flip of channels": (lambda x: x.flip(1, 2), 8),
    "roll": (lambda x: x.roll((1, -2), (2, 3)), 8),
    "roll of channels": (lambda x: x.roll(3, 1), 8),
    "chosen channels": (lambda x: x[:, _ORDER], 8),
    "index_select": (lambda x: x.index_select(1, _ORDER[:5]), 5),
    "channel shuffle by views": (_shuffled, 8),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), 8),
    "native channel shuffle": (nn.ChannelShuffle(4), 8),
    "reflection": (_pad("reflect"), 8),
    "replication": (_pad("replicate"), 8),
    "circular": (_pad("circular"), 8),
    "blur": (BlurPool2d(8).double(), 8),
    "blur of any channels": (BlurPool2d(pad_mode="replicate").double(), 8),
    "add a number": (lambda x: x + 3, 8),
    "add a tensor": (lambda x: x + _BIAS, 8),
    "add in place": (lambda x: x.clone().add_(_BIAS), 8),
    "subtract a tensor": (lambda x: x - _BIAS, 8),
    "subtract from a tensor": (lambda x: _BIAS - x, 8),
    "subtract from a number": (lambda x: 2 - x, 8),
    "negate": (lambda x: -x, 8),
    "multiply and add": (lambda x: 3 * x - 1, 8),
    "divide": (lambda x: x / 4, 8),
    "nearest": (_resized(scale_factor=2), 8),
    "nearest exact": (_resized(scale_factor=1.5, mode="nearest-exact"), 8),
    "bilinear": (_resized(scale_factor=1.5, mode="bilinear"), 8),
    "bilinear to a size": (_resized(size=(5, 12), mode="bilinear", align_corners=True), 8),
    "bicubic": (_resized(scale_factor=2, mode="bicubic"), 8),
    "area": (_resized(size=(3, 4), mode="area"), 8),
    "pool": (nn.AvgPool2d(3, 2), 8),
    "pool of whole and partial windows": (nn.AvgPool2d(2, ceil_mode=True), 8),
    "pool that ignores padding": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 8),
    "pool divided by its size": (nn.AvgPool2d(2, divisor_override=4), 8),
    "pool divided by its size, both given": (nn.AvgPool2d((2, 3), divisor_override=6), 8),
    "pools in a row": (lambda x: F.avg_pool2d(_pad("reflect")(x).flip(2), 2), 8),
}
# The channels of the result are not each one channel of the input.
_ACROSS_BEFORE = {
    "blur with zeros": (BlurPool2d(8, pad_mode="constant").double(), 8),
    "pixel shuffle": (nn.PixelShuffle(2), 2),
}
_ACROSS_AFTER = {"pixel unshuffle": (nn.PixelUnshuffle(2), 32)}


def _compare(model, x, randomise, sizes=_SIZES):
    model = randomise(model.double()).eval()
    folded, report = fold(model, x)
    with torch.no_grad():
        for batch, height, width in sizes:
            other = 3 * torch.randn(batch, x.shape[1], height, width, dtype=torch.float64)
            assert_same(model(other), folded(other))
    assert report.norms_after == len(norms_of(folded))
    return folded, report


def _example(size=8):
    return torch.randn(2, 4, size, size, dtype=torch.float64)


def _sizes(name):
    return [s for s in _SIZES if "shuffle" not in name or not (s[1] % 2 or s[2] % 2)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*_ACROSS, *_ACROSS_BEFORE])
def test_norm_is_fused_into_the_conv_before(name, bias, randomise):
    across, channels = (_ACROSS | _ACROSS_BEFORE)[name]
    model = Net(
        lambda m, x: m.norm(m.across(m.conv(x))),
        conv=nn.Conv2d(4, 8, 3, padding=1, bias=bias),
        norm=nn.BatchNorm2d(channels),
    )
    model.across = across
    folded, _ = _compare(model, _example(), randomise)
    assert norms_of(folded) == []
    assert len([c for c in convs_of(folded) if c.groups == 1]) == 1  # A blur is a layer as well.


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("name", [*_ACROSS, *_ACROSS_AFTER])
def test_norm_is_fused_into_the_conv_behind(name, mode, randomise):
    across, channels = (_ACROSS | _ACROSS_AFTER)[name]
    kernel = 1 if mode == "zeros" else 3
    conv = nn.Conv2d(channels, 4, kernel, padding=kernel // 2, padding_mode=mode, bias=False)
    model = Net(
        lambda m, x: m.conv(m.across(m.norm(torch.cat([x, x.relu()], 1)))),
        conv=conv,
        norm=nn.BatchNorm2d(8),
    )
    model.across = across
    folded, _ = _compare(model, _example(), randomise, _sizes(name))
    assert norms_of(folded) == []
    assert len([c for c in convs_of(folded) if c.groups == 1]) == 1  # A blur is a layer as well.


class _PadsOddSizes(nn.Module):
    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return F.avg_pool2d(x, 2)


# What must not be moved across, in neither direction, at any size of the example.
_NOT_ACROSS = {
    "max pool": lambda x: F.max_pool2d(x, 2),
    "zero padding": lambda x: F.pad(x, (1, 0, 0, 1)),
    "zero padding of no places": lambda x: F.pad(x, (0, 0, 0, 0)),
    "padding with ones": lambda x: F.pad(x, (1, 1), value=1.0),
    "pool of partial windows": nn.AvgPool2d(2, ceil_mode=True, divisor_override=4),
    "pool with padding": nn.AvgPool2d(3, 2, 1),
    "pool divided by another number": nn.AvgPool2d(2, divisor_override=3),
    "pool that pads some sizes": AvgPool2dSame(2, 2),
    "pool that pads some sizes, more": AvgPool2dSame(3, 3),
    "pool that pads odd sizes": _PadsOddSizes(),
    "position": lambda x: x + torch.arange(x.shape[3]),
}


@pytest.mark.parametrize("size", [6, 8, 9])
@pytest.mark.parametrize("name", _NOT_ACROSS)
@pytest.mark.parametrize("before", [False, True])
def test_norm_is_not_moved_across(name, before, size, randomise):
    across = _NOT_ACROSS[name]

    def way(m, x):
        if before:
            return m.norm(m.across(m.conv(x)))
        return m.conv(m.across(m.norm(x.repeat(1, 2, 1, 1))))

    conv = nn.Conv2d(4, 8, 1) if before else nn.Conv2d(8, 4, 1)
    model = Net(way, conv=conv, norm=nn.BatchNorm2d(8))
    model.across = across
    _, report = _compare(model, _example(size), randomise)
    assert report.norms_after == 1
    # Known beforehand, not found by comparing outputs.
    assert "changes by" not in report.kept[0].detail


def test_filters_of_one_channel(randomise):
    model = Net(
        lambda m, x: m.conv(F.conv2d(m.norm(x[:, :1].relu()), m.filters)),
        conv=nn.Conv2d(5, 4, 1),
        norm=nn.BatchNorm2d(1),
    )
    model.register_buffer("filters", torch.randn(5, 1, 3, 2))
    _, report = _compare(model, _example(), randomise)
    assert report.norms_after == 0


def test_added_constant__the_structure_does_not_depend_on_its_values(randomise):
    def net(constant):
        model = Net(
            lambda m, x: m.norm(m.conv(x) + m.c), conv=nn.Conv2d(4, 8, 1), norm=nn.BatchNorm2d(8)
        )
        model.c = nn.Parameter(constant)
        return model

    for shape in ((8, 1, 1), (8, 8, 8)):
        fresh, report = fold(net(torch.zeros(shape)).double().eval(), _example())
        trained, _ = _compare(net(torch.randn(shape)), _example(), randomise, [(2, 8, 8)])
        assert report.norms_after == (shape == (8, 8, 8))
        fresh.load_state_dict(trained.state_dict(), strict=True)


def test_factor_of_zero_in_between(randomise):
    model = Net(lambda m, x: m.norm(m.conv(x) * 0), conv=nn.Conv2d(4, 8, 1), norm=nn.BatchNorm2d(8))
    _compare(model, _example(), randomise)


def test_norm_beside_other_channels_of_a_concatenation(randomise):
    model = Net(
        lambda m, x: m.conv(torch.cat([x.relu(), m.a(x), m.b(-x)], 1)),
        conv=nn.Conv2d(12, 4, 1),
        a=nn.BatchNorm2d(4),
        b=nn.BatchNorm2d(4),
    )
    _, report = _compare(model, _example(), randomise)
    assert report.norms_after == 0
