"""Layers whose weights are computed from constants become plain ones."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import timm
import torch
from timm.layers import CondConv2d, Conv2dSame, MixedConv2d, std_conv
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.ops import Conv2dNormActivation

from tinydet.reparam import expand, fold

from .reference_blocks import assert_same
from .small_networks import Net, convs_of, example, fold_and_compare, norms_of

_OWN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, Conv2dSame)


class Masked(nn.Conv2d):
    """A weight with a fixed mask."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.4).float())

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Normalised(nn.Conv2d):
    """A gain times the weight of unit length, and a bias that is computed, too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.randn(self.out_channels, 1, 1, 1))

    def forward(self, x):
        weight = self.gain * F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight)
        return F.conv2d(x, weight, None, self.stride, self.padding) + 2 * self.bias.view(-1, 1, 1)


class Hyper(nn.Conv2d):
    """A weight that another layer computes from a code: the module has a child."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.code = nn.Parameter(torch.randn(3))
        self.makes = nn.Linear(3, self.weight.numel())
        del self.weight
        self.shape = (self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x):
        weight = self.makes(self.code).view(self.shape)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Padded(nn.Conv2d):
    """A computed weight and a border of another kind, on one side only."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 2, 1, 0)), self.weight.tanh(), self.bias, self.stride)


class Raised(nn.ConvTranspose2d):
    """A transposed convolution with a squared weight."""

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight**2, self.bias, self.stride, self.padding, 1)


class OnChannels(nn.Linear):
    """A linear layer with a computed weight, for channels in the last axis of four."""

    def forward(self, x):
        return F.linear(x.permute(0, 2, 3, 1), self.weight.exp(), self.bias).permute(0, 3, 1, 2)


_LAYERS = {
    "mask": lambda: Masked(4, 4, 3, padding=1),
    "mask dilation": lambda: Masked(4, 6, 3, padding=2, dilation=2, stride=2, groups=2),
    "mask reflect": lambda: Masked(4, 4, 3, padding=1, padding_mode="reflect"),
    "mask same": lambda: Masked(4, 4, (4, 3), padding="same"),
    "gain": lambda: Normalised(4, 5, 3, padding=1, stride=2),
    "hyper": lambda: Hyper(4, 4, 3, padding=1),
    "one-sided": lambda: Padded(4, 4, 3),
    "transposed": lambda: Raised(4, 6, 3, stride=2, padding=1, output_padding=1),
    "permuted": lambda: OnChannels(4, 5),
    "std": lambda: std_conv.StdConv2d(4, 5, 3),
    "std same": lambda: std_conv.StdConv2dSame(4, 5, 3, stride=2),
    "std same stride 1": lambda: std_conv.StdConv2dSame(4, 5, 3),
    "std same 1x1": lambda: std_conv.StdConv2dSame(4, 5, 1, stride=2),
    "std same even": lambda: std_conv.StdConv2dSame(4, 5, 4, stride=3, bias=True),
    "scaled": lambda: std_conv.ScaledStdConv2d(4, 6, 3, groups=2, stride=2),
    "scaled same": lambda: std_conv.ScaledStdConv2dSame(4, 4, 3, stride=2, dilation=2),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(4, 4, 3)),
    "old weight norm": lambda: _old(nn.utils.weight_norm),
    "old spectral norm": lambda: _old(nn.utils.spectral_norm),
    "pruned": lambda: prune.random_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5),
    "pruned twice": lambda: prune.l1_unstructured(
        prune.random_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5), "weight", 0.5
    ),
    "equalised": lambda: _with_hook(nn.Conv2d(4, 4, 3)),
    "two parametrizations": lambda: _doubled(_doubled(nn.Conv2d(4, 4, 3), "weight"), "bias"),
}


def _old(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(nn.Conv2d(4, 4, 3, padding=1))


class _Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight):
        return self.by * weight


def _doubled(layer, name):
    return parametrize.register_parametrization(layer, name, _Double())


class _Equalise:
    """A hook that computes the weight before each call, as in StyleGAN."""

    def __call__(self, module, args):
        del args
        module.weight = module.weight_raw * 0.3


def _with_hook(layer):
    layer.weight_raw = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    layer.weight = layer.weight_raw.detach()
    layer.register_forward_pre_hook(_Equalise())
    return layer


def _network(layer, seed=0):
    torch.manual_seed(seed)
    layer = layer()
    width = layer(torch.randn(1, 4, 9, 9)).shape[1]
    return nn.Sequential(
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        layer,
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 4, 1),
    )


def _only_plain(model):
    layers = [m for m in model.modules() if getattr(m, "weight", None) is not None]
    assert all(type(m) in _OWN for m in layers), layers
    assert all(isinstance(m.weight, nn.Parameter) for m in layers)
    assert not any(parametrize.is_parametrized(m) or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", _LAYERS)
def test_computed_weight_is_baked_and_its_norm_folded(kind, seed, randomise):
    model = randomise(_network(_LAYERS[kind], seed).double(), seed).eval()
    x = example()
    expected = model(x).detach()
    folded, report = fold(model, x)
    assert_same(expected, model(x).detach())  # the original still works
    assert report.norms_before == 1
    assert report.norms_after == 0
    assert report.kept == ()
    _only_plain(folded)
    for batch, height, width in ((2, 9, 9), (1, 5, 6), (3, 8, 7), (1, 14, 11)):
        other = torch.randn(batch, 4, height, width, dtype=torch.float64)
        assert_same(model(other).detach(), folded(other).detach())
    assert_same(folded(x).detach(), pickle.loads(pickle.dumps(folded))(x).detach())
    assert_same(folded(x).detach(), copy.deepcopy(folded)(x).detach())
    again, second = fold(folded, x)
    assert second.folded == second.kept == ()
    assert again.state_dict().keys() == folded.state_dict().keys()
    folded.train()(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


@pytest.mark.parametrize("kind", _LAYERS)
def test_structure_depends_on_the_architecture_alone(kind, randomise):
    trained = randomise(_network(_LAYERS[kind], 0), 0).eval()
    zeroed = _network(_LAYERS[kind], 1).eval()
    for name, p in zeroed.named_parameters():
        if name.startswith("2.") and "spectral" not in kind and "weight norm" not in kind:
            p.data.zero_()  # whatever padding it has, its output is a constant now
    first, _ = fold(trained, example().float())
    second, _ = fold(zeroed, torch.zeros(1, 4, 12, 13))
    second.load_state_dict(first.state_dict(), strict=True)
    kinds = [[type(m).__name__ for m in net.modules()] for net in (first, second)]
    assert kinds[0] == kinds[1]
    x = torch.randn(2, 4, 10, 9)
    assert_same(trained(x).detach(), second(x).detach(), 1e-4)


@pytest.mark.parametrize("kind", ["std same", "scaled same", "std same even", "std same 1x1"])
def test_dynamic_padding_becomes_a_layer_of_timm(kind, randomise):
    folded, _ = fold_and_compare(_network(_LAYERS[kind]), example(), randomise)
    assert type(folded[2]) is (nn.Conv2d if "1x1" in kind else Conv2dSame)


def test_trained_weights_stay_trained_and_frozen_ones_frozen():
    for kind in _LAYERS:
        for trained in (False, True):
            model = _network(_LAYERS[kind]).requires_grad_(trained).eval()
            folded, _ = fold(model, example().float())
            assert all(p.requires_grad == trained for p in folded.parameters()), kind


def _in_code(function, **shapes):
    net = Net(function, norm=nn.BatchNorm2d(4), last=nn.Conv2d(4, 4, 1))
    for name, shape in shapes.items():
        net.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return net


def _linear(net, x):
    return F.linear(x.flatten(2).transpose(1, 2), net.w, net.b)


def _back(x, like):
    return x.transpose(1, 2).reshape(like.shape[0], -1, like.shape[2], like.shape[3])


_CODE = {
    "conv": (
        lambda net, x: net.last(F.relu(net.norm(F.conv2d(x, net.w, net.b, padding=1)))),
        {"w": (4, 4, 3, 3), "b": 4},
    ),
    "conv then bias": (
        lambda net, x: net.last(F.relu(net.norm(F.conv2d(x, net.w.abs(), stride=2) + net.b))),
        {"w": (4, 2, 3, 3), "b": (4, 1, 1)},
    ),
    "linear": (
        lambda net, x: net.last(F.relu(net.norm(_back(_linear(net, x), x)))),
        {"w": (4, 4), "b": 4},
    ),
    "matmul": (
        lambda net, x: net.last(F.relu(net.norm(_back(x.flatten(2).transpose(1, 2) @ net.w, x)))),
        {"w": (4, 4)},
    ),
    "matmul then bias": (
        lambda net, x: net.last(
            F.relu(net.norm(_back(x.flatten(2).transpose(1, 2) @ (2 * net.w) + net.b, x)))
        ),
        {"w": (4, 4), "b": 4},
    ),
}
_CODE["conv then bias"][1]["w"] = (4, 4, 3, 3)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("kind", _CODE)
def test_weight_in_the_code_of_a_block(kind, root, randomise):
    function, shapes = _CODE[kind]
    block = _in_code(function, **shapes)
    model = block if root else nn.Sequential(block, nn.ReLU())
    folded, report = fold_and_compare(
        model, example(), randomise, sizes=((2, 9, 9), (1, 5, 6), (3, 4, 7))
    )
    assert norms_of(folded) == []
    assert report.kept == ()
    _only_plain(folded)
    assert not hasattr(folded if root else folded[0], "w")


def _twice(net, x):
    w = net.w * 2
    return net.norm(F.conv2d(F.relu(F.conv2d(x, w, padding=1)), w, padding=1))


def test_weights_that_are_used_twice_stay_tied(randomise):
    model = nn.Sequential(_in_code(_twice, w=(4, 4, 3, 3)), nn.ReLU())
    folded, report = fold_and_compare(model, example(), randomise)
    assert report.params_after == report.params_before
    assert len(norms_of(folded)) == 1
    assert any("more than once" in step.detail for step in report.kept)
    shared = [Masked(4, 4, 3, padding=1) for _ in range(2)]
    shared[1].weight = shared[0].weight
    model = nn.Sequential(shared[0], nn.ReLU(), shared[1])
    folded, report = fold_and_compare(model, example(), randomise)
    assert folded[0].weight is folded[2].weight
    assert [step.name for step in report.kept] == ["0", "2"]
    assert all("also used" in step.detail for step in report.kept)


class _ByInput(nn.Conv2d):
    """A weight that depends on the input: no constant."""

    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean(), self.bias, padding=1)


class _BySize(nn.Conv2d):
    """A weight that depends on the input's size."""

    def forward(self, x):
        weight = self.weight * torch.linspace(0, 1, x.shape[3])[-2]
        return F.conv2d(x, weight, self.bias, padding=1)


class _Clamped(nn.Conv2d):
    """More than a convolution, which no random input shows."""

    def forward(self, x):
        return F.conv2d(x, self.weight.tanh(), self.bias, padding=1).clamp(min=-1e6)


@pytest.mark.parametrize("kind", [_ByInput, _BySize])
def test_weight_that_is_no_constant_stays(kind, randomise):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), kind(4, 4, 3), nn.BatchNorm2d(4))
    folded, report = fold_and_compare(
        model, example(), randomise, sizes=((2, 9, 9), (1, 5, 6), (3, 4, 7))
    )
    assert type(folded[2]) is kind
    assert report.norms_after == 1
    assert any(step.name == "2" for step in report.kept) == (kind is _BySize)


def test_operations_after_the_layer_stay(randomise):
    model = nn.Sequential(_Clamped(4, 4, 3), nn.BatchNorm2d(4)).double()
    folded, _ = fold_and_compare(model, example(), randomise)
    x = 1e9 * example()
    assert_same(model(x).detach(), folded(x).detach())
    assert len(norms_of(folded)) == 1


def test_other_layers_are_not_touched(randomise):
    mixed = MixedConv2d(4, 8, [3, 5])
    folded, report = fold_and_compare(nn.Sequential(mixed, nn.ReLU()), example(), randomise)
    assert isinstance(folded[0], MixedConv2d)
    assert report.folded == ()
    folded, _ = fold_and_compare(Conv2dNormActivation(4, 4), example(), randomise)
    assert norms_of(folded) == []

    def way(net, x):
        return net.norm(net.cond(x, net.route(x.mean((2, 3))).sigmoid()))

    cond = CondConv2d(4, 4, 3, padding=1, num_experts=3)
    net = Net(way, cond=cond, route=nn.Linear(4, 3), norm=nn.BatchNorm2d(4))
    folded, report = fold_and_compare(net, example(), randomise)
    assert isinstance(folded.cond, CondConv2d)
    assert report.norms_after == 1


def test_expand_of_a_network_with_weight_norm():
    model = nn.Sequential(_old(nn.utils.weight_norm), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(1, 4, 7, 7)
    grown = expand(model, "repvgg", where=lambda name, _: name == "2").eval()
    assert_same(model(x).detach(), grown(x).detach(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["nf_resnet26", "dm_nfnet_f0", "eca_nfnet_l0", "resnetv2_50x1_bit"]
)
def test_timm(name):
    torch.manual_seed(0)
    model = timm.create_model(name).double().eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    kinds = (std_conv.StdConv2d, std_conv.StdConv2dSame)
    kinds += (std_conv.ScaledStdConv2d, std_conv.ScaledStdConv2dSame)
    computed = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    folded, report = fold(model, torch.zeros(1, 3, 64, 64))
    same = "Same" in type(model.get_submodule(computed[0])).__name__
    for name in computed:
        old, new = model.get_submodule(name), folded.get_submodule(name)
        dynamic = same and (max(old.stride) > 1 and max(old.kernel_size) > 1)
        assert type(new) is (Conv2dSame if dynamic else nn.Conv2d), name
    assert {step.name for step in report.kept} == {
        n
        for n, m in folded.named_modules()
        if "Norm" in type(m).__name__ and "Act" in type(m).__name__
    }
    x = torch.randn(2, 3, 96, 70, dtype=torch.float64)
    with torch.no_grad():
        assert_same(model(x), folded(x))
    assert len(convs_of(folded)) == len(convs_of(model))
