"""The layer that a stretch is, against layers whose shape and weights are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tinydet.reparam.equivalent_layer import equivalent_layer, find_geometry
from tinydet.reparam.geometry import NotAConvolutionError


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 6]),
    bias=st.booleans(),
)
def test_a_convolution_is_found_as_itself(kernel, stride, padding, dilation, groups, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups, bias).double()
    found = find_geometry(conv, 6, 2, [groups, 1], dilation * 4 + 3, stride)
    assert (found.kernel_size, found.padding, found.groups) == (kernel, padding, groups)
    assert found.stride == (stride, stride)
    assert found.dilation == tuple(dilation if k > 1 else 1 for k in kernel)
    assert found.bias == bias
    layer = equivalent_layer(conv, found)
    torch.testing.assert_close(layer.weight, conv.weight, rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias, conv.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_dimensions(axes):
    conv = getattr(nn, f"Conv{axes}d")(2, 4, 3, 2, 1).double()
    layer = equivalent_layer(conv, find_geometry(conv, 2, axes, [1], 3, 2))
    torch.testing.assert_close(layer.weight, conv.weight)
    assert type(layer) is type(conv)


def test_linear():
    linear = nn.Linear(5, 3).double()
    layer = equivalent_layer(linear, find_geometry(linear, 5, 0, [1], 0, 1))
    torch.testing.assert_close(layer.weight, linear.weight)
    torch.testing.assert_close(layer.bias, linear.bias)


def test_average_pool_is_a_depthwise_convolution():
    pool = nn.AvgPool2d(3, 2, 1)
    layer = equivalent_layer(pool, find_geometry(pool, 4, 2, [4, 1], 4, 2))
    assert layer.groups == 4
    torch.testing.assert_close(layer.weight, torch.full((4, 1, 3, 3), 1 / 9).double())


def test_groups_that_mix_are_not_taken_for_groups():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1, groups=2)

        def forward(self, x):
            return self.conv(x.roll(1, 1))

    assert find_geometry(Shuffled().double(), 4, 2, [2, 1], 0, 1).groups == 1


def test_several_chunks_of_impulses(monkeypatch):
    monkeypatch.setattr("tinydet.reparam.equivalent_layer._CHUNK", 300)
    conv = nn.Conv2d(7, 5, 3, 2, 1).double()
    layer = equivalent_layer(conv, find_geometry(conv, 7, 2, [1], 3, 2))
    torch.testing.assert_close(layer.weight, conv.weight)


_NOT = {
    "zero padding behind a bias": lambda x: F.pad(x + 1, (1, 1, 1, 1)),
    "mean of all": lambda x: x - x.mean((2, 3), keepdim=True),
    "average without counting zeros": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "place by place": lambda x: x * torch.arange(x.shape[3]),
    "transposed": lambda x: x.transpose(2, 3),
    "flipped": lambda x: x.flip(3),
    "mirrored border": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
    "one sided padding": lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2),
    "constant": lambda x: x * 0,
    "nonlinear": lambda x: x + 1e-3 * x.relu(),
}


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("what", _NOT)
def test_what_is_no_convolution_is_refused(what):
    with pytest.raises(NotAConvolutionError):
        find_geometry(_Function(_NOT[what]), 3, 2, [3, 1], 3, 1)


def test_a_stretch_that_reaches_far_is_refused_before_memory_is_asked_for():
    # Four strides of 9: probing all 6561 x 6561 phases would take terabytes.
    stages = [nn.Conv2d(4, 4, 9, stride=9, dtype=torch.float64) for _ in range(4)]
    with pytest.raises(NotAConvolutionError, match="too large to be probed"):
        find_geometry(nn.Sequential(*stages), 4, 2, [1], reach=8 * (1 + 9 + 81 + 729), stride=6561)


def test_a_kernel_that_costs_more_is_refused_before_it_is_compared():
    # Eight 7x7 convolutions are one of 49x49, at six times the cost.
    stages = [nn.Conv2d(4, 4, 7, padding=3, dtype=torch.float64) for _ in range(8)]
    with pytest.raises(NotAConvolutionError, match="as conv 49x49 4 -> 4 it costs more"):
        find_geometry(nn.Sequential(*stages), 4, 2, [1], 48, 1, most=8 * 4 * 4 * 49)
