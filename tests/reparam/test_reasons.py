"""What remains after a fold is listed, each with a reason that is so."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerScale2d
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold
from tinydet.reparam.norms import is_norm

from .small_networks import Net, conv


def _scaled(way, **members):
    model = Net(way, conv=nn.Conv2d(4, 4, 1), **members)
    model.g = nn.Parameter(torch.randn(4, 1, 1))
    return model


class _Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        x = self.norm(self.conv(x))
        if x.shape[0] > 1000:
            return x
        return x * self.gamma


# A factor that stays, and why.
_FACTORS = {
    "output used elsewhere": (
        lambda: _scaled(lambda m, x: (lambda y: y * m.g + y.relu())(m.conv(x))),
        [],  # Not counted: the output is needed without the factor as well.
    ),
    "conv runs twice": (
        lambda: _scaled(lambda m, x: m.conv(m.conv(x).relu()) * m.g),
        ["conv runs 2 times"],
    ),
    "conv has a hook": (lambda: _hooked(_scaled(lambda m, x: m.conv(x) * m.g)), ["forward hook"]),
    "weights used elsewhere": (
        lambda: _scaled(lambda m, x: m.conv(x) * m.g + m.conv.weight.mean()),
        ["weights of conv are also used elsewhere"],
    ),
    "code cannot be traced": (lambda: nn.Sequential(_Untraceable()), ["not a plain graph"]),
    "depends on a size": (lambda: _scaled(lambda m, x: m.conv(x) * (m.g * x.shape[0])), ["size"]),
    # Not one number for each channel.
    "position": (lambda: _scaled(lambda m, x: m.conv(x) * torch.linspace(0, 1, x.shape[3])), []),
    "two of them": (
        lambda: _scaled(lambda m, x: (m.conv(m.conv(x).relu()) * m.g) * m.g.exp()),
        ["conv runs 2 times", "conv runs 2 times"],
    ),
    "layer scale": (
        lambda: _scaled(lambda m, x: m.s(m.conv(m.conv(x).relu())), s=LayerScale2d(4)),
        ["conv runs 2 times"],
    ),
}


def _hooked(model):
    model.conv.register_forward_hook(lambda *_: None)
    return model


def _check_counts(model, report):
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    branches = [s for s in report.kept if s.detail.startswith("branches stay: ")]
    factors = [s for s in report.kept if s not in branches and s.name not in norms]
    assert len(branches) == report.branches_after
    assert len(factors) == report.scales_after
    assert {s.name for s in report.kept} >= norms
    assert len({s.name for s in report.kept}) == len(report.kept)
    assert all(step.detail and "None" not in step.detail for step in report.kept)
    return branches, factors


@pytest.mark.parametrize("name", _FACTORS)
def test_factor_that_stays_has_its_reason(name):
    make, reasons = _FACTORS[name]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded, report = fold(make().double().eval(), x)
    _, factors = _check_counts(folded, report)
    assert len(factors) == len(reasons)
    for step, reason in zip(factors, reasons, strict=True):
        assert reason in step.detail


class _SizeDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv(1)

    def forward(self, x):
        if x.shape[-1] % 2:
            x = x + 0
        y = F.relu(self.a(x) + self.b(x))
        return self.a(y) - self.b(y)


def test_each_addition_of_branches_that_stays_has_its_reason():
    model = nn.Sequential(_SizeDependent(), nn.ReLU(), _SizeDependent()).double().eval()
    folded, report = fold(model, torch.randn(2, 4, 6, 6, dtype=torch.float64))
    branches, _ = _check_counts(folded, report)
    assert [s.name for s in branches] == [
        "add in 0 (1)",
        "sub in 0 (1)",
        "add in 2 (1)",
        "sub in 2 (1)",
    ]
    assert all("not a plain graph" in s.detail for s in branches)


_X = torch.randn(2, 4, 6, 6, dtype=torch.float64)


def _with(hook):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    hook(model)
    return model


def _shared_weight():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model[3].weight = model[1].weight
    return model


# Networks whose norm stays, and what its reason says.
_NORMS = {
    "pre-activation": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv()),
        "0",
        "its input is an input of the network, not the output of a layer; its output is used by 1",
    ),
    "after an activation": (
        lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()),
        "2",
        "its input comes from 1, not from a conv or linear layer; its output is used by 3",
    ),
    "zero-padded consumer": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv()),
        "1",
        "2, which reads it, pads with zeros: those would be shifted too",
    ),
    "max pool in between": (
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2), nn.BatchNorm2d(4)),
        "2",
        "its input comes from 1, not from a conv or linear layer; "
        "its output is also an output of the network",
    ),
    "zero padding in between": (
        lambda: nn.Sequential(conv(), nn.ZeroPad2d(1), nn.BatchNorm2d(4), nn.ReLU()),
        "2",
        "aten.constant_pad_nd pads with zeros",
    ),
    "pre-hook": (
        lambda: _with(lambda m: m[1].register_forward_pre_hook(lambda *_: None)),
        "1",
        "it has a forward pre-hook",
    ),
    "hook of the conv": (
        lambda: _with(lambda m: m[0].register_forward_hook(lambda *_: None)),
        "1",
        "0 has a forward hook",
    ),
    "shared weight": (_shared_weight, "1", "its weights are also used elsewhere"),
    "a constant": (
        lambda: Net(lambda m, x: x + m.norm(m.p.relu()), norm=nn.BatchNorm2d(4)),
        "norm",
        "its input comes from aten.relu",
    ),
    "a parameter": (
        lambda: Net(lambda m, x: x * m.norm(m.p), norm=nn.BatchNorm2d(4)),
        "norm",
        "its input is constant, not the output of a layer",
    ),
}


@pytest.mark.parametrize("name", _NORMS)
def test_norm_that_stays_has_its_reason(name):
    make, path, reason = _NORMS[name]
    model = make()
    if isinstance(model, Net):
        model.p = nn.Parameter(torch.randn(1, 4, 1, 1))
    folded, report = fold(model.double().eval(), _X)
    _check_counts(folded, report)
    assert reason in {s.name: s.detail for s in report.kept}[path]
