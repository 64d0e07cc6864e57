"""Kernels computed from operations, against impulse responses and against what layers compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold
from tinydet.reparam.affine import crops
from tinydet.reparam.dataflow import observe
from tinydet.reparam.equivalent_layer import equivalent_layer, find_geometry
from tinydet.reparam.geometry import NotAConvolutionError
from tinydet.reparam.linear_map import LinearMap, NotSupportedError, weights_of

from . import reference_blocks as blocks
from .random_networks import CHANNELS, EXAMPLE, SERIES, build, built, runs
from .reference_blocks import assert_same
from .small_networks import Net, conv


def _recorded(module, x, axes=2):
    flow = observe(module, (x,), is_leaf=lambda _: False)
    data = flow.depends_on_input()
    assert not crops(flow.ops, data, flow.outputs[0])
    return LinearMap(flow.ops, data, flow.inputs[0], flow.outputs[0], axes, weights_of(module))


def _layer(module, x, groups=(1,), axes=2):
    linear = _recorded(module, x, axes)
    layer = linear.geometry(groups).build()
    weight, bias = linear.weight_and_bias(linear.geometry(groups))
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
    return layer


@given(series=SERIES, seed=st.integers(0, 1 << 20))
@settings(max_examples=20, deadline=None)
def test_random_network__as_its_impulse_response(series, seed):
    torch.manual_seed(seed)
    module = built(*(build(plan) for plan in series))
    x = torch.randn(EXAMPLE, dtype=torch.float64)
    assume(runs(module, x))
    groups = [CHANNELS, 1]
    try:
        expected = find_geometry(module, CHANNELS, 2, groups, reach=60, stride=_stride(module))
    except NotAConvolutionError:
        with pytest.raises((NotAConvolutionError, NotSupportedError)):
            _recorded(module, x).geometry(groups)
        return
    linear = _recorded(module, x)
    try:
        found = linear.geometry(groups)
    except NotSupportedError:
        return
    assert found == expected
    layer = equivalent_layer(module, expected)
    weight, bias = linear.weight_and_bias(found)
    assert_same(layer.weight.detach(), weight)
    if found.bias:
        assert_same(layer.bias.detach(), bias)


def _stride(module):
    total = 1
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.AvgPool2d)):
            steps = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,)
            total *= max(steps)
    return total


class _Way(Net):
    def __init__(self, way):
        torch.manual_seed(0)
        super().__init__(
            way,
            a=conv(3),
            b=conv(1, bias=False),
            d=conv(5, groups=4, bias=False),
            n=nn.BatchNorm2d(4),
            s=nn.Conv2d(4, 8, 3, 2, 1, groups=2),
            p=nn.Conv2d(8, 4, 1),
            h=nn.Conv2d(2, 2, 3, padding=1, bias=False),
            v=nn.Conv2d(4, 4, (3, 1), dilation=(2, 1), bias=False),
        )
        self.g = nn.Parameter(torch.randn(4, 1, 1))
        self.double().eval()


# (groups it has, the function)
_WAYS = {
    "depthwise and identity": (4, lambda m, x: m.d(x) - x * m.g),
    "norm before a dense kernel": (1, lambda m, x: m.b(m.n(x))),
    "dense before depthwise": (1, lambda m, x: m.b(x) - m.d(m.b(x))),
    "factor of weights": (4, lambda m, x: m.d.weight.sum() * m.d(x) / 3),
    "stride and groups": (1, lambda m, x: m.p(m.s(x) * 2)),
    "average of a stride": (2, lambda m, x: m.s(x) + F.avg_pool2d(x, 3, 2, 1).repeat(1, 2, 1, 1)),
    "half of the channels": (1, lambda m, x: torch.cat([m.h(x[:, :2]), x[:, 2:]], 1)),
    "halves swapped": (1, lambda m, x: m.b(torch.cat(x.chunk(2, 1)[::-1], 1))),
    "every other channel": (1, lambda m, x: m.h(x[:, ::2]) + x.split([2, 2], 1)[1]),
    "every second pixel": (1, lambda m, x: m.b(m.b(x)[:, :, ::2, ::2])),
    "one pixel cropped": (1, lambda m, x: m.a(F.pad(x, (1, 1, 1, 1)))[:, :, 1:-1, 1:-1]),
    "uneven pads": (1, lambda m, x: m.b(x) + m.v(F.pad(x, (0, 0, 2, 2)))),
    "dilated in series": (1, lambda m, x: m.v(m.v(F.pad(x, (0, 0, 4, 4))))),
    "scale from the right": (1, lambda m, x: 1 - (2 - m.a(x)) * m.g / 5),
    "shift of zeros": (1, lambda m, x: m.a(x) - m.a(torch.zeros_like(x[:1, :, :1, :1]))),
    "weight of weights": (1, lambda m, x: F.conv2d(x, m.a.weight / m.a.weight.norm(), padding=1)),
}
_NO_RULE = {"average of a stride"}


@pytest.mark.parametrize("name", _WAYS)
def test_rule__as_the_module(name):
    groups, way = _WAYS[name]
    module = _Way(way)
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    if name in _NO_RULE:
        with pytest.raises(NotSupportedError):
            _layer(module, x)
        return
    layer = _layer(module, x, (groups, 1) if groups > 1 else (1,))
    assert layer.groups == groups
    with torch.no_grad():
        for size in ((9, 10), (12, 7), (14, 15)):
            x = torch.randn(3, 4, *size, dtype=torch.float64)
            assert_same(module(x), layer(x))


_NOT = {
    "zero padding behind a shift": lambda m, x: m.b(F.pad(m.n(x), (1, 1, 1, 1))),
    "padded twice": lambda m, x: m.d(m.d(x)),
    "one side": lambda m, x: m.b(F.pad(x, (1, 0, 0, 0))),
    "crop before padding": lambda m, x: m.d(x[:, :, 1:-1]),
    "border not counted": lambda m, x: F.avg_pool2d(m.b(x), 3, 1, 1, count_include_pad=False),
    "more windows": lambda m, x: F.avg_pool2d(m.b(x), 2, 2, ceil_mode=True),
    "nothing": lambda m, x: m.b(x) * 0,
}


@pytest.mark.parametrize("name", _NOT)
def test_what_is_no_convolution_is_refused(name):
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with pytest.raises(NotAConvolutionError):
        _recorded(_Way(_NOT[name]), x).geometry([1])


@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: m.b(x) + torch.arange(x.shape[3]).to(x),
        lambda m, x: m.b(x.flip(3)),
        lambda m, x: m.b(x) * float(m.g.detach().sum()),
        lambda m, x: m.b(F.pad(x, (1, 1, 1, 1), value=2.0)),
        lambda m, x: m.b(x) + m.b(x).mean((2, 3), keepdim=True),
    ],
)
def test_what_has_no_rule_is_left_to_impulses(way):
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with pytest.raises(NotSupportedError):
        _recorded(_Way(way), x).geometry([1])


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 3, 2, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(shape, bias):
    torch.manual_seed(0)
    first, second = nn.Linear(4, 6, bias), nn.Linear(6, 4)
    g = torch.randn(4)
    module = Net(lambda m, x: m.second(m.first(x)) * g - x / 2, first=first, second=second).double()
    x = torch.randn(shape, dtype=torch.float64)
    layer = _layer(module, x, axes=0)
    assert_same(module(x).detach(), layer(x).detach())


def test_values_of_weights_do_not_matter():
    # Weights of zeros or ones have the taps, the bias and the groups of random ones.
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    module = _Way(lambda m, x: m.n(m.d(x)) + x)
    expected = _recorded(module, x).geometry([4, 1])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for value in (0.0, 1.0):
        for parameter in module.parameters():
            nn.init.constant_(parameter, value)
        assert _recorded(module, x).geometry([4, 1]) == expected
    module.load_state_dict(before)
    assert expected.groups == 4
    assert expected.bias


@pytest.mark.parametrize(
    "make",
    [blocks.Amber, blocks.Basalt, blocks.Dolomite, blocks.Emerald, blocks.Garnet, blocks.Jade],
)
def test_usual_blocks_need_no_impulses(make, monkeypatch, randomise):
    def fail(*_, **__):
        raise AssertionError("probed by impulses")

    monkeypatch.setattr("tinydet.reparam.merge.find_geometry", fail)
    monkeypatch.setattr("tinydet.reparam.merge.equivalent_layer", fail)
    torch.manual_seed(0)
    model = randomise(make().double()).eval()
    channels = 4 if make is blocks.Emerald else 8
    _, report = fold(model, torch.randn(2, channels, 9, 8, dtype=torch.float64))
    assert report.branches_after == 0 < report.branches_before


def test_many_channels_and_a_large_kernel(randomise):
    # Densely, the kernels of one channel each would take 384 x 384 x 31 x 31 numbers: a GiB.
    torch.manual_seed(0)
    block = randomise(blocks.Flint(384).double()).eval()
    layer = _layer(block, torch.randn(1, 384, 3, 4, dtype=torch.float64), (384, 1))
    assert (layer.kernel_size, layer.groups) == ((31, 31), 384)
    x = torch.randn(1, 384, 16, 3, dtype=torch.float64)
    with torch.no_grad():
        assert_same(block(x), layer(x))
