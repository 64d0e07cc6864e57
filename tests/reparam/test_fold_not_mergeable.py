"""What must not be merged: non-linear, position-dependent or otherwise used values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold

from .random_networks import (
    CHANNELS,
    EXAMPLE,
    SIZES,
    SMALL,
    Connected,
    build,
    built,
    check_same,
    counted,
)
from .reference_blocks import assert_same


def _pooled_softmax(y):
    return torch.softmax(y.mean((2, 3), keepdim=True), 1)


# How two linear stretches a and b are connected so that they are not one.
_NOT_LINEAR = {
    "relu": lambda a, b, x: b(F.relu(a(x))),
    "relu on one branch": lambda a, b, x: a(x) + F.relu(b(x)),
    "max pooling": lambda a, b, x: b(F.max_pool2d(a(x), 3, 1, 1)),
    "softmax gate": lambda a, b, x: b((lambda y: y * _pooled_softmax(y))(a(x))),
    "sigmoid gate": lambda a, b, x: a(x) * torch.sigmoid(b(x)),
    "abs": lambda a, b, x: b(a(x).abs()),
    "product": lambda a, b, x: a(x) * b(x),
    "square": lambda a, b, x: b((lambda y: y * y)(a(x))),
    "power": lambda a, b, x: b(a(x) ** 2),
    "maximum": lambda a, b, x: torch.maximum(a(x), b(x)),
    "quotient": lambda a, b, x: a(x) / (3 + b(x).abs()),
    "clamp": lambda a, b, x: b(a(x).clamp(-1, 2)),
    # On inputs of order one these two do nothing at all.
    "wide clamp": lambda a, b, x: b(a(x).clamp(-2e3, 2e3)),
    "wide hardtanh": lambda a, b, x: a(x) + F.hardtanh(b(x), -2e3, 2e3),
    "other source": lambda a, b, x: a(x) + b(F.relu(x)),
    "product with the input": lambda a, b, x: a(x) + b(x) * x,
}


def _connected(way, a, b, seed):
    torch.manual_seed(seed)
    return built(Connected(build(a), build(b), way))


@pytest.mark.parametrize("way", _NOT_LINEAR)
@given(a=SMALL, b=SMALL, seed=st.integers(0, 1 << 20))
@settings(max_examples=4, deadline=None)
def test_non_linear__never_merged(way, a, b, seed):
    model = _connected(_NOT_LINEAR[way], a, b, seed)
    x = torch.randn(EXAMPLE, dtype=torch.float64)
    folded, report = fold(model, x)
    check_same(model, folded, scales=(1.0, 1e5, -1e5))
    kinds = counted(model, x)[1]
    assert kinds
    assert counted(folded, x)[1] == kinds
    assert report.macs_after <= report.macs_before


# Tensors inside a stretch that something else sees as well.
_SEEN = {
    "second consumer": lambda a, b, x: (lambda y: b(y) * F.relu(y))(a(x)),
    "mean of it": lambda a, b, x: (lambda y: F.relu(b(y)) + y.mean((2, 3), keepdim=True))(a(x)),
    "returned": lambda a, b, x: (lambda y: (b(y), y))(a(x)),
    "returned as a view": lambda a, b, x: (lambda y: (b(y), y.flatten(2)))(a(x)),
    "branch returned": lambda a, b, x: (lambda y: (F.relu(y + b(x)), y))(a(x)),
    "written to afterwards": lambda a, b, x: (lambda y: (b(y), y.mul_(2)))(a(x)),
}


@pytest.mark.parametrize("way", _SEEN)
@given(a=SMALL, b=SMALL, seed=st.integers(0, 1 << 20))
@settings(max_examples=5, deadline=None)
def test_seen_tensor_keeps_its_values(way, a, b, seed):
    model = _connected(_SEEN[way], a, b, seed)
    x = torch.randn(EXAMPLE, dtype=torch.float64)
    folded, report = fold(model, x)
    check_same(model, folded)
    # A branch that is needed anyway is not computed twice.
    assert report.macs_after <= report.macs_before
    assert counted(folded, x)[0] <= counted(model, x)[0]


@pytest.mark.parametrize("changes", [False, True])
@given(
    a=SMALL,
    b=SMALL,
    way=st.sampled_from([lambda a, b, x: b(a(x)), lambda a, b, x: a(x) + b(x)]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=8, deadline=None)
def test_hook_inside_a_stretch_sees_the_same(changes, a, b, way, seed):
    seen = []

    def hook(module, args, output):
        del module, args
        seen.append(output.detach().clone())
        return output * 2 if changes else None

    torch.manual_seed(seed)
    model = built(Connected(build(a), build(b), way), nn.ReLU())
    model[0].a.register_forward_hook(hook)
    folded, _ = fold(model, torch.randn(EXAMPLE, dtype=torch.float64))
    for size in SIZES:
        x = torch.randn(size, dtype=torch.float64)
        seen.clear()
        with torch.no_grad():
            outputs = model(x), folded(x)
        assert len(seen) == 2
        assert_same(seen[0], seen[1])
        assert_same(*outputs)


def test_norm_of_its_own_batch_stays():
    torch.manual_seed(0)
    for way in (lambda a, b, x: b(a(x)), lambda a, b, x: a(x) + b(x)):
        own = nn.Sequential(
            nn.BatchNorm2d(CHANNELS, track_running_stats=False), nn.Conv2d(CHANNELS, CHANNELS, 1)
        )
        conv = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS))
        model = built(Connected(conv, own, way), nn.ReLU())
        folded, report = fold(model, torch.randn(EXAMPLE, dtype=torch.float64))
        assert report.norms_after == 1
        assert len(report.kept) == 1
        check_same(model, folded, SIZES[1:], scales=(1.0, 30.0))


_CONSTANT = torch.linspace(-1, 2, CHANNELS, dtype=torch.float64).view(-1, 1, 1)
_FAR = torch.ones(64, 64, dtype=torch.float64)  # one wherever the example's pixels are
_FAR[20:, 30:] = 0.5

# Linear, but not a convolution of the input: nothing to merge with, everything to keep.
_NOT_INVARIANT = {
    "flip": lambda m, x: m.b(m.a(x).flip(3)),
    "transposed axes": lambda m, x: m.b(m.a(x).transpose(2, 3)),
    "roll": lambda m, x: m.a(x) + m.b(x).roll(1, 2),
    "shuffled channels": lambda m, x: (
        m.b(m.a(x).view(-1, 2, 2, *x.shape[2:]).mT.reshape(x.shape))
        if x.shape[2] == x.shape[3]
        else m.b(m.a(x))
    ),
    "reflected border": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), mode="reflect")),
    "replicated border": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), mode="replicate")),
    "border of ones": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)),
    "cropped": lambda m, x: m.b(m.a(x)[:, :, 1:, :-1]),
    "cropped branch": lambda m, x: m.b(x)[:, :, 1:, 1:] + m.a(x)[:, :, :-1, :-1],
    "every second pixel": lambda m, x: m.b(m.a(x)[:, :, ::2, ::2]),
    "half of the channels": lambda m, x: m.b(torch.cat([m.a(x)[:, :2], x[:, 2:]], 1)),
    "swapped halves": lambda m, x: m.b(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)),
    "enlarged": lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2)),
    "pooled to one pixel": lambda m, x: m.a(x) + m.b(F.adaptive_avg_pool2d(x, 1)),
    "other pixels' mean": lambda m, x: m.b(m.a(x) - x.mean((2, 3), keepdim=True)),
    "position": lambda m, x: m.b(m.a(x) + torch.arange(x.shape[3]).to(x)),
    "mask": lambda m, x: m.b(m.a(x) * torch.arange(x.shape[2]).to(x)[:, None]),
    "size": lambda m, x: m.b(m.a(x) / x.shape[2]) + m.a(x) * x.shape[3],
    "size of a branch": lambda m, x: m.a(x) / x.shape[2] + m.b(x),
    "size before a norm": lambda m, x: m.b(m.a[0](x) * x.shape[3]),
    "size of the batch": lambda m, x: m.a(x) / x.shape[0] + m.b(x),
    "first pixels of large images": lambda m, x: (m.a(x) + m.b(x))[:, :, :40, :40],
    "window of the source": lambda m, x: (lambda y: m.a(y) + m.b(y))(x[:, :, :40, :40]),
    "first two samples": lambda m, x: (lambda y: m.a(y) + m.b(y))(x[:2]),
    "mask that begins far away": lambda m, x: m.a(x) * _FAR[: x.shape[2], : x.shape[3]] + m.b(x),
    "tensor of no module": lambda m, x: m.a(x) * _CONSTANT + m.b(x),
    "pixels to channels and back": lambda m, x: m.b(
        F.pixel_unshuffle(F.pixel_shuffle(m.a(x), 2), 2)
    ),
    "cast to integers": lambda m, x: m.b(m.a(x).to(torch.int32).to(x.dtype)) + m.a(x),
    "batch": lambda m, x: m.b(m.a(x) * torch.arange(len(x)).to(x)[:, None, None, None]),
    "batch mean": lambda m, x: m.a(x) + m.b(x.mean(0, keepdim=True)),
    "transposed conv": lambda m, x: m.b(F.conv_transpose2d(m.a(x), m.t, stride=2)),
    "own weight": lambda m, x: m.b(m.a(x)) * m.a[0].weight.mean(),
    "weight made on the fly": lambda m, x: F.conv2d(m.a(x), m.t / m.t.norm(), padding=1) + m.b(x),
}


class _NotInvariant(nn.Module):
    def __init__(self, way, kernel):
        super().__init__()
        pad = kernel // 2
        self.a, self.b = (
            nn.Sequential(
                nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=pad), nn.BatchNorm2d(CHANNELS)
            )
            for _ in range(2)
        )
        self.t = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3))
        self.way = way

    def forward(self, x):
        return F.relu(self.way(self, x))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("way", _NOT_INVARIANT)
def test_not_shift_invariant__same_function(way, kernel):
    torch.manual_seed(0)
    model = built(_NotInvariant(_NOT_INVARIANT[way], kernel))
    folded, report = fold(model, torch.randn(2, CHANNELS, 12, 12, dtype=torch.float64))
    check_same(
        model, folded, ((2, CHANNELS, 12, 12), (1, CHANNELS, 5, 8), (1, CHANNELS, 45, 46), *SIZES)
    )
    assert report.macs_after <= report.macs_before


def test_uniform_map_over_positions_is_no_scale_of_channels():
    def net(value):
        torch.manual_seed(0)
        model = built(_NotInvariant(lambda m, x: m.b(m.a(x) * m.g), 1))
        model[0].g = nn.Parameter(value.double())
        return model

    x = torch.randn(2, CHANNELS, 6, 6, dtype=torch.float64)
    uniform, _ = fold(net(torch.full((CHANNELS, 6, 6), 0.1)), x)
    trained, _ = fold(net(torch.randn(CHANNELS, 6, 6)), x)
    assert uniform.state_dict().keys() == trained.state_dict().keys()
    uniform.load_state_dict(trained.state_dict(), strict=True)
    assert_same(trained(x).detach(), uniform(x).detach())
