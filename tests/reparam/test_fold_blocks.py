"""Blocks from the literature under meaningless names: each becomes one convolution a stretch."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from timm.models.repvit import RepVggDw
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold

from . import reference_blocks as blocks
from .reference_blocks import assert_same, dense_kernel, equivalent_conv
from .small_networks import convs_of, norms_of

_IMAGES = ((2, 16, 16), (1, 1, 1), (3, 2, 5), (1, 9, 7))  # (B, H, W)


@dataclass(frozen=True)
class _Case:
    """A block of 8 input channels and the convs (kernel, stride, padding, groups) it becomes.

    `reach` is that of the one kernel that the block without its activation is, if it is one.
    """

    build: Callable[[], nn.Module]
    convs: tuple[tuple[int, int, int, int], ...]
    channels_out: int = 8
    channels: int = 8
    reach: int | None = None


def _series(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def _conv(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


def _norm(channels):
    return lambda: nn.BatchNorm2d(channels)


_CASES = {
    "repvgg": _Case(blocks.Amber, ((3, 1, 1, 1),), reach=1),
    "repvgg stride 2": _Case(lambda: blocks.Amber(8, 12, 2), ((3, 2, 1, 1),), 12, reach=1),
    "repvgg stride 2, groups": _Case(
        lambda: blocks.Amber(8, 8, 2, groups=2), ((3, 2, 1, 2),), reach=1
    ),
    "repvgg groups": _Case(lambda: blocks.Amber(groups=4), ((3, 1, 1, 4),), reach=1),
    "mobileone": _Case(blocks.Basalt, ((3, 1, 1, 1),), reach=1),
    "mobileone depthwise": _Case(lambda: blocks.Basalt(groups=8), ((3, 1, 1, 8),), reach=1),
    "mobileone depthwise stride 2": _Case(
        lambda: blocks.Basalt(stride=2, groups=8), ((3, 2, 1, 8),), reach=1
    ),
    "mobileone pointwise": _Case(lambda: blocks.Basalt(kernel=1), ((1, 1, 0, 1),), reach=0),
    "mobileone kernel 7": _Case(
        lambda: blocks.Basalt(kernel=7, groups=8, copies=1), ((7, 1, 3, 8),), reach=3
    ),
    "acnet": _Case(blocks.Cobalt, ((3, 1, 1, 1),), reach=1),
    "acnet stride 2": _Case(lambda: blocks.Cobalt(stride=2), ((3, 2, 1, 1),), reach=1),
    "dbb, padded first": _Case(blocks.Dolomite, ((3, 1, 1, 1),), reach=1),
    "dbb, padded first, groups": _Case(lambda: blocks.Dolomite(groups=2), ((3, 1, 1, 2),), reach=1),
    "dbb, border written": _Case(blocks.Dunite, ((3, 1, 1, 1),), reach=1),
    "dbb, border by difference": _Case(blocks.Diorite, ((3, 1, 1, 1),), reach=1),
    "unireplk": _Case(lambda: blocks.Emerald(4), ((13, 1, 6, 4),), 4, 4, reach=6),
    "replk": _Case(lambda: blocks.Flint(4), ((31, 1, 15, 4),), 4, 4, reach=15),
    "repmixer": _Case(blocks.Garnet, ((3, 1, 1, 8),), reach=1),
    "layer scale": _Case(blocks.Halite, ((1, 1, 0, 1), (3, 1, 1, 1))),
    "ghost v3": _Case(blocks.Jade, ((1, 1, 0, 1), (3, 1, 1, 8)), 16),
    "shared block": _Case(blocks.Lapis, ((3, 1, 1, 1),)),
    "two consumers": _Case(blocks.Marble, ((3, 1, 1, 1),)),
    "repvit": _Case(lambda: RepVggDw(8, 3), ((3, 1, 1, 8),), reach=1),
    "conv and norm": _Case(_series(_conv(8, 8, 3, padding=1), _norm(8)), ((3, 1, 1, 1),), reach=1),
    "norm and conv": _Case(_series(_norm(8), _conv(8, 8, 1)), ((1, 1, 0, 1),), reach=0),
    # 8 -> 32 -> 8 costs 512 a pixel and 64 as one; 8 -> 2 -> 8 costs 32 and 64 as one.
    "expansion": _Case(
        _series(_conv(8, 32, 1), _norm(32), _conv(32, 8, 1), _norm(8)), ((1, 1, 0, 1),), reach=0
    ),
    "expansion after 3x3": _Case(
        _series(_conv(8, 32, 3, padding=1), _norm(32), _conv(32, 8, 1)), ((3, 1, 1, 1),), reach=1
    ),
    "expansion before padded 3x3, no shift": _Case(
        _series(_conv(8, 32, 1, bias=False), _conv(32, 8, 3, padding=1)), ((3, 1, 1, 1),), reach=1
    ),
    "expansion before padded 3x3, with a shift": _Case(
        _series(_conv(8, 32, 1), _norm(32), _conv(32, 8, 3, padding=1)),
        ((1, 1, 0, 1), (3, 1, 1, 1)),
    ),
    "bottleneck": _Case(
        _series(_conv(8, 2, 1), _norm(2), _conv(2, 8, 1), _norm(8)),
        ((1, 1, 0, 1), (1, 1, 0, 1)),
        reach=0,
    ),
}


class _Network(nn.Module):
    """A block between a non-linear function and a convolution that is not part of it."""

    def __init__(self, block, channels):
        super().__init__()
        self.body = nn.Sequential()
        self.body.add_module("unit", block)
        self.tail = nn.Conv2d(channels, 5, 3, padding=1)

    def forward(self, x):
        return self.tail(F.silu(self.body(torch.tanh(x))))


def _build(case, randomise, seed=0):
    torch.manual_seed(seed)
    return randomise(_Network(case.build(), case.channels_out).double(), seed).eval()


def _example(case):
    return torch.randn(2, case.channels, 16, 16, dtype=torch.float64)


@pytest.fixture(scope="module")
def folded_of():
    """Fold each network once for all tests of this file."""
    made = {}

    def get(name, randomise):
        if name not in made:
            model = _build(_CASES[name], randomise)
            made[name] = (model, *fold(model, _example(_CASES[name])))
        return made[name]

    return get


def _signature(conv):
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    assert conv.dilation == (1, 1)
    assert conv.padding_mode == "zeros"
    return (*(p[0] if p == (p[0], p[0]) else p for p in pairs), conv.groups)


@pytest.mark.parametrize("name", [n for n, case in _CASES.items() if case.reach is not None])
def test_reference_block_is_the_convolution_it_should_be(name, randomise):
    # The blocks themselves, not `fold`: each is one zero-padded conv, at the border as well.
    case = _CASES[name]
    block = _build(case, randomise).body.unit
    if hasattr(block, "z"):
        block.z = nn.Identity()
    stride = case.convs[0][1]
    kernel, bias = equivalent_conv(block, case.channels, case.reach, stride)
    for batch, height, width in _IMAGES:
        x = torch.randn(batch, case.channels, height, width, dtype=torch.float64)
        assert_same(F.conv2d(x, kernel, bias, stride, case.reach), block(x).detach())


@pytest.mark.parametrize("name", _CASES)
def test_folds_to(name, randomise, folded_of):
    case = _CASES[name]
    model, folded, report = folded_of(name, randomise)
    tail = [(3, 1, 1, 1)]
    assert Counter(map(_signature, convs_of(folded))) == Counter([*case.convs, *tail])
    assert norms_of(folded) == []
    assert report.norms_before == len(norms_of(model))
    assert report.norms_after == 0
    assert report.kept == ()
    assert report.branches_after == 0
    assert report.scales_after == 0
    assert report.macs_after <= report.macs_before
    assert report.params_after == sum(p.numel() for p in folded.parameters())
    in_convs = sum(p.numel() for conv in convs_of(folded) for p in conv.parameters())
    assert report.params_after == in_convs
    assert sum(p.numel() for p in folded.state_dict().values()) == report.params_after


@pytest.mark.parametrize("name", _CASES)
def test_same_function(name, randomise, folded_of):
    case = _CASES[name]
    model, folded, _ = folded_of(name, randomise)
    with torch.no_grad():
        for batch, height, width in _IMAGES:
            for scale in (1.0, -100.0):
                x = scale * torch.randn(batch, case.channels, height, width, dtype=torch.float64)
                assert_same(model(x), folded(x))


@pytest.mark.parametrize(
    "name", [n for n, case in _CASES.items() if case.reach is not None and len(case.convs) == 1]
)
def test_kernel(name, randomise, folded_of):
    case = _CASES[name]
    model, folded, _ = folded_of(name, randomise)
    block = copy.deepcopy(model.body.unit)
    if hasattr(block, "z"):
        block.z = nn.Identity()
    kernel, bias = equivalent_conv(block, case.channels, case.reach, case.convs[0][1])
    (conv,) = [conv for conv in convs_of(folded) if conv.out_channels != 5]
    assert_same(kernel, dense_kernel(conv))
    assert_same(bias, conv.bias.detach())


def test_macs_are_those_of_the_convolutions(randomise, folded_of):
    # RepVGG on 2 x 16 x 16 pixels: 3x3 8 -> 8, and the tail's 3x3 8 -> 5.
    _, _, report = folded_of("repvgg", randomise)
    assert report.macs_after == 2 * 16 * 16 * 9 * 8 * (8 + 5)
    assert report.macs_before >= report.macs_after + 2 * 16 * 16 * 8 * 8
    assert report.branches_before == 2


# A layer, a chain of layers, and code that was rewritten.
_RESULTS = {"repvgg", "layer scale", "ghost v3", "shared block", "two consumers", "norm and conv"}


@pytest.mark.parametrize(
    "name", [n if n in _RESULTS else pytest.param(n, marks=pytest.mark.slow) for n in _CASES]
)
def test_result_copies_exports_and_loads(name, randomise, folded_of):
    case = _CASES[name]
    _, folded, _ = folded_of(name, randomise)
    x = _example(case)
    with torch.no_grad():
        expected = folded(x)
        assert_same(expected, pickle.loads(pickle.dumps(folded))(x))
        assert_same(expected, copy.deepcopy(folded)(x))
        assert_same(expected, torch.export.export(folded, (x,)).module()(x))
        other, _ = fold(_build(case, randomise, seed=1), torch.zeros_like(x))
        assert (other(x) - expected).abs().max() > 1e-6
        other.load_state_dict(folded.state_dict(), strict=True)
        assert_same(expected, other(x))


@pytest.mark.parametrize("name", _CASES)
def test_names_tell_where_a_weight_belongs(name, randomise, folded_of):
    _, folded, _ = folded_of(name, randomise)
    keys = set(folded.state_dict())
    assert {"tail.weight", "tail.bias"} < keys
    rest = keys - {"tail.weight", "tail.bias"}
    assert rest
    assert all(key.startswith("body.unit.") for key in rest), rest


@pytest.mark.parametrize("name", _CASES)
def test_result_trains(name, randomise, folded_of):
    _, folded, _ = folded_of(name, randomise)
    student = copy.deepcopy(folded).train()
    assert all(p.requires_grad and p.is_leaf for p in student.parameters())
    student(_example(_CASES[name])).square().mean().backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


def test_frozen_weights_stay_frozen(randomise):
    case = _CASES["repvgg"]
    model = _build(case, randomise)
    model.body.requires_grad_(False)
    folded, _ = fold(model, _example(case))
    frozen = {key: not p.requires_grad for key, p in folded.named_parameters()}
    assert frozen == {key: not key.startswith("tail") for key in frozen}


@pytest.mark.parametrize("name", ["repvgg", "dbb, padded first", "repmixer", "acnet"])
def test_block_alone(name, randomise):
    case = _CASES[name]
    block = _build(case, randomise).body.unit
    x = _example(case)
    folded, _ = fold(block, x)
    assert len(convs_of(folded)) == 1
    assert norms_of(folded) == []
    with torch.no_grad():
        assert_same(block(x[:, :, :5]), folded(x[:, :, :5]))


class _Matmuls(nn.Module):
    """x A + x B + x with bare matrices: no linear layer that could be named."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.n = nn.BatchNorm1d(8)

    def forward(self, x):
        return F.relu(self.n(x @ self.a + x @ self.b + x))


# name: (module, number of linear layers after folding or None if any will do, rank of the input)
_LINEAR = {
    "parallel": (blocks.Kyanite, 1, 2),
    "layer scale": (blocks.Iolite, 2, 3),
    "expansion": (_series(lambda: nn.Linear(8, 32), lambda: nn.Linear(32, 8)), 1, 3),
    "expansion with norms": (
        _series(
            lambda: nn.Linear(8, 32),
            lambda: nn.BatchNorm1d(32),
            lambda: nn.Linear(32, 8),
            lambda: nn.BatchNorm1d(8),
        ),
        1,
        2,
    ),
    "bottleneck": (_series(lambda: nn.Linear(8, 2), lambda: nn.Linear(2, 8)), 2, 3),
    "bare matrices": (_Matmuls, None, 2),
}


@pytest.mark.parametrize("name", _LINEAR)
def test_linear_layers(name, randomise):
    build, count, rank = _LINEAR[name]
    torch.manual_seed(0)
    model = randomise(nn.Sequential(build(), nn.SiLU(), nn.Linear(8, 3)).double()).eval()
    x = torch.randn(6, *[4] * (rank - 2), 8, dtype=torch.float64)
    folded, report = fold(model, x)
    with torch.no_grad():
        assert_same(model(x), folded(x))
        y = 50 * torch.randn(1, *[9] * (rank - 2), 8, dtype=torch.float64)
        assert_same(model(y), folded(y))
    assert report.macs_after <= report.macs_before
    if count is not None:
        assert len([m for m in folded.modules() if isinstance(m, nn.Linear)]) == count + 1
        assert (report.norms_after, report.branches_after, report.scales_after) == (0, 0, 0)
        assert report.params_after == sum(
            p.numel() for m in folded.modules() if isinstance(m, nn.Linear) for p in m.parameters()
        )
    assert_same(model(x).detach(), pickle.loads(pickle.dumps(folded))(x).detach())


def test_closed_form_of_parallel_linear_layers(randomise):
    model = randomise(blocks.Kyanite().double()).eval()
    folded, _ = fold(model, torch.randn(4, 8, dtype=torch.float64))
    (linear,) = [m for m in folded.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        shift = model(torch.zeros(1, 8, dtype=torch.float64))
        matrix = (model(torch.eye(8, dtype=torch.float64)) - shift).T
    assert_same(matrix, linear.weight.detach())
    assert_same(shift[0], linear.bias.detach())
