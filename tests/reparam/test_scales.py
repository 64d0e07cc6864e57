"""Norms and factors beside layers, against torch's own fusion and against running both."""

import itertools

import pytest
import torch
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    LayerScale,
    LayerScale2d,
    SyncBatchNormAct,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.ops.misc import FrozenBatchNorm2d

from tinydet.reparam.dataflow import observe
from tinydet.reparam.fuse_affine import Fusion

_LAST = torch.channels_last

_GRID = [
    (kernel, stride, groups, dilation, bias)
    for kernel, stride, groups, dilation, bias in itertools.product(
        (1, 3, 5), (1, 2), (1, 2, 8), (1, 2), (False, True)
    )
]


@pytest.mark.parametrize(("kernel", "stride", "groups", "dilation", "bias"), _GRID)
def test_conv_norm__grid(kernel, stride, groups, dilation, bias, check_fold, randomise):
    conv = nn.Conv2d(
        8, 16, kernel, stride, kernel // 2, dilation=dilation, groups=groups, bias=bias
    )
    model = randomise(nn.Sequential(conv, nn.BatchNorm2d(16, eps=1e-2)).double())
    x = torch.randn(2, 8, 11, 9, dtype=torch.float64)
    folded, _ = check_fold(model, x)
    expected = fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(folded[0].weight, expected.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(folded[0].bias, expected.bias, rtol=1e-9, atol=1e-12)
    assert isinstance(folded[1], nn.Identity)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_conv_norm__dimensions_and_transposed(dimensions, groups, transposed, check_fold):
    kind = f"{'Transpose' if transposed else ''}{dimensions}d"
    conv = getattr(nn, f"Conv{kind}")(4, 6, 3, stride=2, groups=groups)
    norm = getattr(nn, f"BatchNorm{dimensions}d")(6)
    x = torch.randn(2, 4, *[7] * dimensions, dtype=torch.float64)
    check_fold(nn.Sequential(conv, norm).double(), x)


def test_conv_norm__reflected_padding_and_same_padding(check_fold):
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    reflected = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    for conv in (reflected, Conv2dSame(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3, padding="same")):
        check_fold(nn.Sequential(conv, nn.BatchNorm2d(4)).double(), x)


def test_linear_norm(check_fold, randomise):
    model = randomise(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).double()).eval()
    folded, _ = check_fold(model, torch.randn(3, 5, dtype=torch.float64))
    expected = fuse_linear_bn_eval(model[0], model[1])
    torch.testing.assert_close(folded[0].weight, expected.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_norm__through_a_flattening_view(bias, check_fold):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6, bias=bias), nn.BatchNorm1d(6)

        def forward(self, x):
            x = self.linear(x)
            return self.norm(x.flatten(0, 1)).reshape_as(x)

    folded, _ = check_fold(Net().double(), torch.randn(2, 6, 6, dtype=torch.float64))
    assert isinstance(folded.norm, nn.Identity)


def test_linear_norm__other_axis_is_not_folded(check_fold):
    # BatchNorm1d of (N, L, C) normalises axis L; with L == C the shapes alone do not tell.
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).double()
    _, report = check_fold(model, torch.randn(2, 6, 6, dtype=torch.float64), left=1)
    assert "channels" in report.kept[0].detail


def test_linear_norm__two_halves_of_the_output(check_fold):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.linear(x).view(-1, 4))

    check_fold(Net().double(), torch.randn(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["plain", "affine_less", "sync", "frozen", "act", "sync_act"])
def test_norm_kinds(kind, check_fold):
    norm = {
        "plain": lambda: nn.BatchNorm2d(4),
        "affine_less": lambda: nn.BatchNorm2d(4, affine=False),
        "sync": lambda: nn.SyncBatchNorm(4),
        "frozen": lambda: FrozenBatchNorm2d(4),
        "act": lambda: BatchNormAct2d(4, act_layer=nn.SiLU),
        "sync_act": lambda: SyncBatchNormAct(4),
    }[kind]()
    if kind == "sync_act":
        norm.act, norm.drop = nn.ReLU(), nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm).double()
    folded, _ = check_fold(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    expected = {"act": nn.SiLU, "sync_act": nn.ReLU}.get(kind, nn.Identity)
    assert type(folded[1]) is expected


def test_norm_act__drop_and_act_stay_in_order(check_fold):
    norm = BatchNormAct2d(4, act_layer=nn.ReLU, drop_layer=nn.Hardtanh)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).double()
    folded, _ = check_fold(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert [type(m) for m in folded[1]] == [nn.Hardtanh, nn.ReLU]


def test_norm_without_running_statistics_stays(check_fold):
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).double()
    _, report = check_fold(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), left=1)
    assert "running statistics" in report.kept[0].detail


def test_other_norms_stay(check_fold):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)).double()
    _, report = check_fold(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), left=2)
    assert [step.name for step in report.kept] == ["1", "2"]


def test_two_norms_in_a_row(check_fold):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4))
    check_fold(model.double(), torch.randn(2, 3, 6, 6, dtype=torch.float64))


def test_subclass_of_batch_norm_stays(check_fold):
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4)).double()
    check_fold(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), left=1)


class _Net(nn.Module):
    """A conv, a norm, and a way to connect them that must not be folded."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), way

    def forward(self, x):
        return self.way(self, x)


_UNFOLDABLE = {
    "conv called twice": lambda m, x: m.norm(m.conv(m.conv(x))),
    "norm called twice": lambda m, x: m.norm(m.norm(m.conv(x))),
    "output added": lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
    "output returned": lambda m, x: (lambda y: (m.norm(y), y))(m.conv(x)),
    "output changed in place": lambda m, x: m.norm(m.conv(x).relu_()),
    "function between": lambda m, x: m.norm(m.conv(x) ** 2),
    "half of the output": lambda m, x: (lambda a, b: m.norm(a) + b)(*m.conv(x).chunk(2, dim=3)),
    "channels from another axis": lambda m, x: m.norm(m.conv(x).transpose(1, 3)),
    "weight used by a function": lambda m, x: m.norm(m.conv(x)) + m.conv.weight.mean(),
    "norm's weight used by a function": lambda m, x: m.norm(m.conv(x)) * m.norm.weight.mean(),
    "pool that counts zeros": lambda m, x: m.norm(F.avg_pool2d(m.conv(x), 3, 1, 1)),
    "norm before zero padding": lambda m, x: m.conv(m.norm(x)),
    "norm not run": lambda m, x: m.conv(x),
}


@pytest.mark.parametrize("way", _UNFOLDABLE)
def test_not_folded(way, check_fold):
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    model = _Net(_UNFOLDABLE[way]).double()
    _, report = check_fold(model, x, left=1)
    assert report.kept[0].name == "norm"
    assert report.kept[0].detail
    assert len(report.kept) == 1 + report.scales_after


def test_not_folded__reasons(check_fold):
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for way, reason in {
        "conv called twice": "conv runs 2 times",
        "norm called twice": "its input comes from norm",
        "norm before zero padding": "pads with zeros",
        "norm not run": "it runs 0 times",
        "output added": "also used by aten.add in the network",
        "output returned": "also an output of the network",
        "function between": "comes from aten.pow in the network",
    }.items():
        _, report = check_fold(_Net(_UNFOLDABLE[way]).double(), x, left=1)
        assert reason in report.kept[0].detail


def test_not_folded__weight_shared_by_two_layers(check_fold):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).double()
    model[2].weight = model[0].weight
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    _, report = check_fold(model, x, left=1)
    assert "used elsewhere" in report.kept[0].detail


def test_not_folded__conv_with_hook(check_fold):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    model[0].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    _, report = check_fold(model, x, left=1)
    assert "hook" in report.kept[0].detail


def test_hook_of_the_norm_moves_to_what_replaces_it(check_fold):
    class Doubles:
        def __call__(self, *args):
            return args[-1] * 2

    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    model[1].register_forward_hook(Doubles())
    check_fold(model, torch.randn(2, 4, 4, 4, dtype=torch.float64))


def test_norm_under_two_names_is_replaced_under_both(check_fold):
    model = _Net(lambda m, x: m.norm(m.conv(x))).double()
    model.alias = model.norm
    folded, _ = check_fold(model, torch.randn(2, 4, 4, 4, dtype=torch.float64))
    assert not any("running" in key for key in folded.state_dict())


def test_in_place_activation_after_a_folded_norm(check_fold):
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)
    )
    check_fold(model.double(), torch.randn(2, 4, 4, 4, dtype=torch.float64))


class _Flow(nn.Module):
    """Layers and a way to connect them that can be folded."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1, bias=False)
        self.norm, self.half = nn.BatchNorm2d(8), nn.BatchNorm2d(4)
        self.c, self.d, self.fc = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Linear(8, 3)
        self.e = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")
        self.gamma = nn.Parameter(torch.randn(8, 1, 1))
        self.way = way

    def forward(self, x):
        return self.way(self, x)


_FOLDABLE = {
    "sum of two sources": lambda m, x: m.norm(m.a(x.relu()) + m.b(x.abs())),
    "difference": lambda m, x: m.norm(m.a(x.relu()) - m.b(x.abs())),
    "in-place sum": lambda m, x: m.norm(m.a(x.relu()).add_(m.b(x.abs()))),
    "concatenation": lambda m, x: m.norm(torch.cat([m.c(m.a(x).relu()), m.d(m.b(x).relu())], 1)),
    "transposed output": lambda m, x: m.norm(m.a(x).transpose(2, 3)),
    "channels last copy": lambda m, x: m.norm(m.a(x).contiguous(memory_format=_LAST)),
    "pooled output": lambda m, x: m.norm(F.avg_pool2d(m.a(x), 2)),
    "norm before 1x1": lambda m, x: m.c(m.norm(x.repeat(1, 2, 1, 1).relu())),
    "norm before two readers": lambda m, x: (lambda y: m.c(y).relu() + m.d(y).relu())(
        m.norm(x.repeat(1, 2, 1, 1))
    ),
    "norm before reflected padding": lambda m, x: m.e(m.norm(x.repeat(1, 2, 1, 1))),
    "norm, pool, linear": lambda m, x: m.fc(m.norm(x.repeat(1, 2, 1, 1)).mean((2, 3))),
    "norm, pool kept, linear": lambda m, x: m.fc(
        F.adaptive_avg_pool2d(m.norm(x.repeat(1, 2, 1, 1)), 1).flatten(1)
    ),
    "called twice alike": lambda m, x: m.norm(m.a(x)).relu() + m.norm(m.a(-x)).relu(),
}


@pytest.mark.parametrize("way", _FOLDABLE)
def test_folded_past_what_keeps_channels_apart(way, check_fold):
    model = _Flow(_FOLDABLE[way]).double()
    del model.half
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded, _ = check_fold(model, x)
    other = torch.randn(3, 4, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(folded(other), model(other), rtol=1e-9, atol=1e-9)


_SCALED = {
    "tensor": lambda m, x: m.a(x) * m.gamma,
    "tensor first": lambda m, x: m.gamma * m.a(x),
    "number": lambda m, x: m.a(x) * 0.3,
    "divided": lambda m, x: m.a(x) / 3.0,
    "computed": lambda m, x: m.a(x).mul(m.gamma.exp().sigmoid()),
    "norm between": lambda m, x: m.norm(m.a(x)) * m.gamma,
    "linear": lambda m, x: m.fc(m.norm(m.a(x)).mean((2, 3)).relu()) * m.gamma[:3, 0, 0],
}


@pytest.mark.parametrize("way", _SCALED)
def test_factor_in_code(way, check_fold):
    model = _Flow(_SCALED[way]).double()
    if way not in ("norm between", "linear"):
        del model.norm
    del model.half
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded, report = check_fold(model, x)
    names = {op.name for op in observe(folded, (x,), is_leaf=lambda _: False).ops}
    assert not names & {"aten.mul", "aten.div"}
    assert report.scales_after == 0


@pytest.mark.parametrize("layer", [LayerScale2d(8, 0.3), LayerScale2d(8, 0.3, inplace=True)])
def test_layer_scale(layer, check_fold):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), layer).double()
    folded, report = check_fold(model, torch.randn(2, 4, 6, 6, dtype=torch.float64))
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity, nn.Identity]
    assert (report.scales_before, report.scales_after) == (1, 0)


def test_layer_scale__after_linear(check_fold):
    model = nn.Sequential(nn.Linear(4, 8), LayerScale(8, 0.3), nn.ReLU()).double()
    folded, _ = check_fold(model, torch.randn(2, 5, 4, dtype=torch.float64))
    expected = model[0].weight * model[1].gamma[:, None]
    torch.testing.assert_close(folded[0].weight, expected)


@pytest.mark.parametrize("kind", ["dense", "grouped", "linear", "transposed"])
def test_norm_before_layer__weights(kind, check_fold):
    """W (s x + t) + b = (W diag(s)) x + (W t + b), the products written out."""
    layer = {
        "dense": nn.Conv2d(4, 6, 1),
        "grouped": nn.Conv2d(4, 6, 1, groups=2, bias=False),
        "linear": nn.Linear(4, 6),
        "transposed": nn.ConvTranspose2d(4, 6, 1),
    }[kind]
    norm = nn.BatchNorm1d(4) if kind == "linear" else nn.BatchNorm2d(4)
    shape = (3, 4) if kind == "linear" else (3, 4, 5, 5)
    model = nn.Sequential(nn.ReLU(), norm, layer).double()
    folded, _ = check_fold(
        model, torch.randn(shape, dtype=torch.float64), left=int(kind == "transposed")
    )
    if kind in ("dense", "linear"):
        s = norm.weight / (norm.running_var + norm.eps).sqrt()
        t = norm.bias - s * norm.running_mean
        weight = layer.weight.flatten(1)
        torch.testing.assert_close(folded[2].weight.flatten(1), weight @ torch.diag(s))
        torch.testing.assert_close(folded[2].bias, weight @ t + layer.bias)


@pytest.mark.parametrize("fails", ["1", "4"])
def test_move_whose_check_fails_is_undone(fails, check_fold, monkeypatch):
    right = Fusion.apply

    def wrong(self):
        right(self)
        if self.call.name == str(int(fails) - 1):
            self.call.module.weight.data *= 1.01

    monkeypatch.setattr(Fusion, "apply", wrong)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    _, report = check_fold(model.double(), torch.randn(2, 4, 7, 7, dtype=torch.float64), left=1)
    assert [step.name for step in report.kept] == [fails]
    assert "its output changes by" in report.kept[0].detail
    assert len(report.folded) == 1


def test_factor_of_a_number(check_fold):
    """As in torchvision's detectors, which scale by numbers that depend on the image."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y * (y.mean() * 2.0)

    check_fold(Net().double(), torch.randn(2, 4, 7, 7, dtype=torch.float64))
