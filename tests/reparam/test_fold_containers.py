"""Modules that are also held in lists, tuples, dicts and plain attributes."""

from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold
from tinydet.reparam.module_swap import replace_modules

from .reference_blocks import Amber, assert_same
from .small_networks import check_nothing_unused, norms_of

_Held = namedtuple("_Held", "first second")


def test_replace_modules__in_every_container():
    old, new, other = nn.ReLU(), nn.Identity(), nn.Tanh()
    inner = nn.Module()
    inner.x, inner.rows = old, ["a", (other, {"k": [old]})]
    inner.__dict__["beside"] = old
    inner.held, inner.other = _Held(old, other), [other]
    model = nn.Sequential(inner, old)
    rows, kept = inner.rows, inner.other
    replace_modules(model, {old: new})
    assert model[1] is inner.x is inner.beside is inner.held.first is new
    assert inner.rows == ["a", (other, {"k": [new]})]
    assert type(inner.held) is _Held
    assert inner.other is kept
    assert rows == ["a", (other, {"k": [old]})]  # So the change can be undone.


class _ConvNorm(nn.Conv2d):
    """A conv with a norm inside, as detectron2's."""

    def __init__(self, c_in, c_out, kernel, stride=1, activation=None):
        super().__init__(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.norm, self.activation = nn.BatchNorm2d(c_out), activation

    def forward(self, x):
        x = self.norm(super().forward(x))
        return x if self.activation is None else self.activation(x)


class _Bottleneck(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.shortcut = nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
        )
        self.conv1, self.norm1 = nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out)
        self.conv2 = Amber(c_out, c_out)

    def forward(self, x):
        y = self.conv2(F.relu_(self.norm1(self.conv1(x))))
        y += self.shortcut(x)
        return F.relu_(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
        self.stages, self.stage_names = [], []
        for n, (c_in, c_out) in enumerate([(4, 4), (4, 6), (6, 8)]):
            stage = nn.Sequential(_Bottleneck(c_in, c_out, 1 + (n > 0)))
            self.add_module(f"res{n}", stage)
            self.stages.append(stage)
            self.stage_names.append(f"res{n}")

    def forward(self, x):
        outputs, x = {}, F.relu_(self.stem(x))
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            outputs[name] = x = stage(x)
        return outputs


class FPN(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom_up = ResNet()
        self.widths = {"res0": 4, "res1": 6, "res2": 8}
        laterals, outputs = [], []
        for n, width in enumerate(self.widths.values()):
            laterals.append(nn.Conv2d(width, 8, 1))
            laterals[-1] = nn.Sequential(laterals[-1], nn.BatchNorm2d(8))
            outputs.append(Amber(8, 8))
            self.add_module(f"lateral{n}", laterals[-1])
            self.add_module(f"output{n}", outputs[-1])
        self.laterals, self.outputs = laterals[::-1], tuple(outputs[::-1])
        self.by_name = dict(zip(self.widths, outputs, strict=True))

    def forward(self, x):
        features = self.bottom_up(x)
        assert len(features) == len(self.widths), "one feature map a level"
        results, above = [], None
        for name, lateral, output in zip(
            list(self.widths)[::-1], self.laterals, self.outputs, strict=True
        ):
            here = lateral(features[name])
            if above is not None:
                here = (here + F.interpolate(above, size=here.shape[-2:], mode="nearest")) / 2
            results.insert(0, output(here))
            above = here
        return [*results, self.by_name["res2"](above)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_fpn_of_lists(dtype, randomise):
    model = randomise(FPN()).eval().to(dtype)
    x = torch.randn(1, 3, 32, 40, dtype=dtype)
    folded, report = fold(model, x)
    assert report.norms_after == report.branches_after == 0
    assert norms_of(folded) == []
    wide, narrow = copy.deepcopy(folded).double(), copy.deepcopy(model).double()
    with torch.no_grad():
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2}[dtype]
        assert_same(narrow(x.double()), wide(x.double()), tolerance)
        assert {y.dtype for y in folded(x)} == {dtype}
    check_nothing_unused(wide, x.double())


def test_result_uses_the_weights_in_its_state(randomise):
    model = randomise(FPN()).eval()
    x = torch.randn(1, 3, 32, 40)
    folded, _ = fold(model, x)
    for key in folded.state_dict():
        changed = copy.deepcopy(folded)
        state = changed.state_dict()
        state[key] = torch.randn_like(state[key]) + 1
        changed.load_state_dict(state)
        with torch.no_grad():
            assert any(not torch.equal(a, b) for a, b in zip(folded(x), changed(x), strict=True)), (
                key
            )
