"""Norms are judged by what they compute, not by their class."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0, EvoNorm2dS0, SplitBatchNorm2d
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold
from tinydet.reparam.dataflow import observe
from tinydet.reparam.norms import count_norms, is_norm

from .reference_blocks import assert_same
from .small_networks import Net, convs_of, example, fold_and_compare


class Frozen(nn.Module):
    """A batch norm with fixed statistics, written as many detection libraries do."""

    eps = 1e-5

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("weight", torch.randn(channels))
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class FrozenByName(nn.Module):
    """The same under other names, with a trained scale, a division, and an activation inside."""

    def __init__(self, channels):
        super().__init__()
        self.g = nn.Parameter(torch.randn(channels))
        self.register_buffer("m", torch.randn(channels, 1, 1))
        self.register_buffer("v", torch.rand(channels, 1, 1) + 0.5)
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x):
        return self.act((x - self.m) / torch.sqrt(self.v) * self.g[:, None, None])


class FrozenFunctional(Frozen):
    """The same with torch's function."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Renamed(nn.BatchNorm2d):
    """A subclass with its own forward, which in inference is an ordinary batch norm."""

    def forward(self, x):
        if self.training:
            return super().forward(x) * 1.1
        return super().forward(x)


class RenamedAct(BatchNormAct2d):
    """A subclass with an activation."""

    def forward(self, x):
        return super().forward(x)


class Held(nn.BatchNorm2d):
    """A subclass that holds its activation under a name of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.nonlinearity = nn.Hardswish()

    def forward(self, x):
        return self.nonlinearity(super().forward(x))


class Doubled(nn.BatchNorm2d):
    """An affine function of another kind, seen by its operations only."""

    def forward(self, x):
        return 2 * (super().forward(x) - 1)


class ByInput(nn.BatchNorm2d):
    """Statistics of the input, mixed with the running ones."""

    def forward(self, x):
        mean = 0.5 * (self.running_mean[:, None, None] + x.mean((0, 2, 3), keepdim=True))
        return (x - mean) * (self.running_var + self.eps).rsqrt()[:, None, None]


class ByPlace(nn.BatchNorm2d):
    """A scale that differs from place to place."""

    def forward(self, x):
        return super().forward(x) * torch.linspace(1, 2, x.shape[3]) / self.eps**0.5


def _instance(channels):
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


def _lazy(channels):
    norm = nn.LazyBatchNorm2d()
    norm(torch.randn(2, channels, 3, 3))
    return norm


_CONSTANT = {
    "frozen": Frozen,
    "frozen by name": FrozenByName,
    "frozen functional": FrozenFunctional,
    "renamed": Renamed,
    "renamed with activation": RenamedAct,
    "with activation": Held,
    "split": SplitBatchNorm2d,
    "instance": _instance,
    "instance, not affine": lambda c: nn.InstanceNorm2d(c, track_running_stats=True),
    "synchronised": nn.SyncBatchNorm,
    "lazy": _lazy,
    "not affine": lambda c: nn.BatchNorm2d(c, affine=False),
}


def _network(norm, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)
    )
    return net.eval()


def _fold_and_compare(model, randomise):
    """As `fold_and_compare`, for norms that are no subclass of torch's."""
    model = randomise(model).double().eval()
    folded, report = fold(model, example())
    for size in ((2, 9, 9), (1, 5, 6), (3, 4, 7)):
        x = torch.randn(size[0], 4, *size[1:], dtype=torch.float64)
        with torch.no_grad():
            assert_same(model(x), folded(x))
    assert report.norms_after == count_norms(folded)
    return folded, report


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", _CONSTANT)
def test_constant_norm_is_folded_and_counted(kind, seed, randomise):
    model = _network(_CONSTANT[kind], seed)
    folded, report = fold_and_compare(
        model, example(), randomise, sizes=((2, 9, 9), (1, 3, 3), (3, 4, 7))
    )
    assert report.norms_before == 1
    assert report.norms_after == count_norms(folded) == 0
    assert report.kept == ()
    assert len(convs_of(folded)) == 2
    assert not any(name.endswith("running_var") for name, _ in folded.named_buffers())
    other, _ = fold(_network(_CONSTANT[kind], seed + 7), torch.zeros(1, 4, 6, 6))
    other.load_state_dict(folded.float().state_dict(), strict=True)


@pytest.mark.parametrize("kind", ["frozen", "frozen by name", "renamed", "instance"])
def test_norm_before_its_layer_is_folded_into_it(kind, randomise):
    # Only a norm without an activation can move into the layer behind it.
    norm = _CONSTANT[kind](4)
    model = nn.Sequential(nn.MaxPool2d(2), norm, nn.Conv2d(4, 4, 1)).eval()
    _, report = _fold_and_compare(model, randomise)
    assert report.norms_before == 1
    assert report.norms_after == (kind == "frozen by name")
    assert len(report.kept) == report.norms_after


def _in_code(net, x):
    y = F.batch_norm(net.conv(x), net.mean, net.var, net.g, net.b, eps=net.eps)
    return net.last(F.relu(y))


def _alone(net, x):
    return net.last(F.batch_norm(F.max_pool2d(net.conv(x), 2), net.mean, net.var))


@pytest.mark.parametrize("way", [_in_code, _alone])
@pytest.mark.parametrize("root", [False, True])
def test_batch_norm_in_the_code_of_a_block(way, root, randomise):
    net = Net(way, conv=nn.Conv2d(4, 6, 3), last=nn.Conv2d(6, 4, 1))
    net.eps = 0.1
    net.register_buffer("mean", torch.randn(6))
    net.register_buffer("var", torch.rand(6) + 0.5)
    net.g, net.b = (nn.Parameter(torch.randn(6)) for _ in range(2))
    model = net if root else nn.Sequential(net, nn.ReLU())
    folded, report = fold_and_compare(
        model, example(), randomise, sizes=((2, 9, 9), (1, 5, 6), (3, 4, 7))
    )
    assert (report.norms_before, report.norms_after) == (1, 0)
    flow = observe(folded, (example(),), is_leaf=lambda _: False)
    assert not [op for op in flow.ops if "batch_norm" in op.name]


@pytest.mark.parametrize(
    "norm",
    [
        EvoNorm2dB0,
        lambda c: EvoNorm2dS0(c, groups=2),
        ByInput,
        ByPlace,
        Doubled,
        nn.InstanceNorm2d,
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        lambda c: nn.GroupNorm(2, c),
    ],
)
def test_other_norms_stay_with_a_reason(norm, randomise):
    model = _network(norm)
    kind = type(model[1])
    folded, report = _fold_and_compare(model, randomise)
    assert type(folded[1]) is kind
    counted = is_norm(model[1])
    assert counted == (kind is not EvoNorm2dS0)  # it has no running statistics, and no known class
    assert report.norms_before == report.norms_after == counted
    assert [step.name for step in report.kept] == ["1"] * counted


def test_unfoldable_norm_still_trains(randomise):
    model = randomise(nn.Sequential(FrozenByName(4), Renamed(4), nn.Tanh())).eval()
    folded, report = fold(model, example().float())
    assert report.norms_after == 2
    folded.train()(example().float()).sum().backward()
    assert len(list(folded.parameters())) == 4  # two scales, two shifts
    assert all(p.grad is not None for p in folded.parameters())
