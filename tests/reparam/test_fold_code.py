"""Modules whose code is called, or written, in ways that a plain trace does not follow."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold

from .reference_blocks import Amber, assert_same
from .small_networks import Net, WithChecks, conv, convs_of, example, fold_and_compare


class _Two(nn.Module):
    """Two branches, and what the subclasses do with the arguments of the call."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv(1)

    def both(self, x):
        return F.relu(self.a(x) + self.b(x))


class _Keywords(_Two):
    def forward(self, x, *, mask=None, mode="plain", scale=1.0):
        y = self.both(x) * scale
        if mode == "double":
            y = 2 * y
        return y if mask is None else y * mask


class _Pair(_Two):
    def forward(self, pair):
        x, size = pair
        height, width = size
        return self.both(x).flatten(2).reshape(*x.shape[:2], height, width)


class _Concatenated(_Two):
    def forward(self, xs):
        return self.both(torch.cat(xs, 1))


class _Pyramid(_Two):
    def forward(self, xs):
        return sum(F.interpolate(self.both(x), size=xs[0].shape[-2:]) for x in xs)


class _Named(_Two):
    def forward(self, features):
        return {name: self.both(x) for name, x in features.items()}


class _Any(_Two):
    def forward(self, *xs, **options):
        return self.both(xs[0]) + xs[1] * options.get("factor", 3)


def _halves(x):
    return [x[:, :2], x[:, 2:]]


_CALLS = {
    "keywords": (_Keywords, lambda m, x: m.block(x, mask=None, mode="double", scale=0.5)),
    "sizes": (_Pair, lambda m, x: m.block((x, (x.shape[-2], x.shape[-1])))),
    "list, joined": (_Concatenated, lambda m, x: m.block(_halves(x))),
    "list, in a loop": (_Pyramid, lambda m, x: m.block([x, F.avg_pool2d(x, 2, ceil_mode=True)])),
    "list of one": (_Concatenated, lambda m, x: m.block([x])),
    "dict": (_Named, lambda m, x: m.block(features={"p": x, "q": -x})["q"]),
    "any number": (_Any, lambda m, x: m.block(x, x.abs(), factor=2)),
}


@pytest.mark.parametrize("call", _CALLS)
def test_calls(call, randomise):
    kind, way = _CALLS[call]
    model = Net(way, block=kind())
    folded, report = fold_and_compare(model, example(), randomise)
    assert report.branches_after == 0
    assert {c.kernel_size for c in convs_of(folded)} == {(3, 3)}


def test_argument_that_was_a_constant__is_not_ignored(randomise):
    model = Net(_CALLS["keywords"][1], block=_Keywords())
    block = fold_and_compare(model, example(), randomise)[0].block
    x = example()
    expected = model.block(x, mode="double")
    assert_same(expected, block(x, mask=None, mode="double", scale=1.0))
    for changed in ({"mask": x}, {"mode": "plain"}):
        with pytest.raises(ValueError, match="as when it was folded"):
            block(x, **{"mode": "double", **changed})


class _Residual(nn.Module):
    """As torchvision's ConvNeXt block: the sum is made in place."""

    def __init__(self):
        super().__init__()
        self.block, self.drop = nn.Sequential(conv(), nn.GELU(), conv(1)), nn.Dropout(0.5)
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        y = self.gamma * self.block(x)
        y = self.drop(y)
        y += x
        return y


def test_sum_in_place_after_a_factor(randomise):
    folded, report = fold_and_compare(nn.Sequential(_Residual(), _Residual()), example(), randomise)
    assert (report.scales_before, report.scales_after) == (2, 0)
    assert not [n for n, _ in folded.named_parameters() if "gamma" in n]


class _InPlace(_Two):
    def forward(self, x):
        y, n = self.a(x), 1
        n += x.shape[1]
        y += self.b(x)
        y *= n
        return y.relu_() + x


def test_sum_of_branches_in_place(randomise):
    folded, _ = fold_and_compare(nn.Sequential(_InPlace(), nn.ReLU()), example(), randomise)
    assert len(convs_of(folded)) == 1


class _ChangesItsInput(_Two):
    def forward(self, x):
        y = x
        y += self.a(x) + self.b(x)
        return x * 2


def test_input_changed_in_place(randomise):
    model = Net(lambda m, x: m.block(y := x.clone()) + y, block=_ChangesItsInput())
    fold_and_compare(model, example(), randomise)


def test_checks_stay(randomise):
    folded, _ = fold_and_compare(nn.Sequential(WithChecks()), example(), randomise)
    (only,) = convs_of(folded)
    assert only.kernel_size == (3, 3)
    for bad in (torch.ones(1, 4, 3, 31), torch.ones(1, 3, 3, 3), torch.ones(4, 3, 3)):
        with pytest.raises((AssertionError, ValueError)):
            folded(bad.double())


class _Drops(_Two):
    def forward(this, x):  # noqa: N805
        return F.dropout(this.both(x).add(1), 0.5, this.training)


def test_dropout_in_code_still_acts_in_training(randomise):
    folded, _ = fold_and_compare(nn.Sequential(_Drops()), example(), randomise)
    assert len(convs_of(folded)) == 1
    assert (folded(example()) == 0).sum() == 0
    zeros = (folded.train()(example()) == 0).double().mean()
    assert 0.3 < zeros < 0.7


class _Even(_Two):
    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return self.both(x)


class _Dtype(_Two):
    def forward(self, x):
        y = self.both(x)
        return y.clamp(max=1.0) if x.dtype == torch.float32 else y


@pytest.mark.parametrize("kind", [_Even, _Dtype])
def test_conditions_on_size_or_dtype_are_not_decided(kind, randomise):
    model = Net(lambda m, x: m.block(x), block=kind())
    folded, report = fold_and_compare(model, example(), randomise, [(1, 4, 5), (1, 4, 6)])
    assert type(folded.block) is kind
    assert "not a plain graph" in report.kept[0].detail
    x = torch.randn(1, 4, 4, 4)
    assert_same(model.float()(x), folded.float()(x), 1e-6)


def _decorated(context):
    class Decorated(_Two):
        def __init__(self):
            super().__init__()
            self.c, self.norm = conv(), nn.BatchNorm2d(4)
            self.scale = nn.Parameter(torch.randn(4, 1, 1))

        @context()
        def forward(self, x):
            return self.norm(self.scale * self.c(self.both(x)))

    return Decorated


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_decorated_code(context, randomise):
    model = nn.Sequential(conv(1), _decorated(context)(), Amber(4, 4))
    folded, report = fold_and_compare(model, example(), randomise)
    assert report.branches_after == report.norms_after == 0
    assert len(convs_of(folded[1])) == 2
    assert {n for n, _ in folded[1].named_parameters(recurse=False)} == set()
    y = folded[1](example())
    assert not y.requires_grad
    assert y.is_inference() == (context is torch.inference_mode)


class _Script(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.side = conv(), nn.BatchNorm2d(4), conv(1)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.side(x)


@pytest.mark.parametrize("how", [torch.jit.script, lambda m: torch.jit.trace(m, example())])
def test_scripted_children_are_left_alone(how, randomise):
    inner = how(randomise(_Script().double()).eval())

    def way(m, x):
        return F.relu(m.one(x) + m.two(x)) + m.inner(x)

    model = Net(way, one=conv(), two=conv(1), inner=inner)
    folded, report = fold_and_compare(nn.Sequential(model, Amber(4, 4)), example(), randomise)
    assert isinstance(folded[0].inner, torch.jit.ScriptModule)
    assert len(convs_of(folded)) == 2
    if how is torch.jit.script:  # Whose branches are seen.
        assert any("TorchScript" in step.detail for step in report.kept)


_SMALL = {
    "coat_tiny": {
        "embed_dims": (32, 32, 32, 32), "serial_depths": (1, 1, 1, 1), "parallel_depth": 1
    },
    "twins_pcpvt_small": {
        "embed_dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)
    },
    "twins_svt_small": {
        "embed_dims": (16, 32, 32, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)
    },
    "beit_base_patch16_224": {
        "embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 0.1,
        "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True,
    },
    "rdnet_tiny": {"num_init_features": 16, "growth_rates": (8, 8, 16, 16, 16, 16, 16)},
}  # fmt: skip


@pytest.mark.parametrize("name", _SMALL)
def test_timm(name):
    sized = {} if name == "rdnet_tiny" else {"img_size": 64}
    model = timm.create_model(name, num_classes=5, **sized, **_SMALL[name]).eval()
    x = _check_network(model)
    assert hasattr(model, "forward_features")
    folded, _ = fold(model, x)
    with torch.no_grad():
        assert_same(model.forward_features(x), folded.forward_features(x), 1e-4)


def test_torchvision_convnext():
    setting = torchvision.models.convnext.CNBlockConfig
    _check_network(torchvision.models.ConvNeXt([setting(16, 32, 1), setting(32, None, 2)]).eval())


def _check_network(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.0 if parameter.ndim < 2 else 0.2, generator=generator)
    x = torch.randn(2, 3, 64, 64, generator=generator)
    folded, report = fold(model, x)
    assert report.branches_before + report.scales_before > 0
    assert report.branches_after == report.scales_after == 0
    with torch.no_grad():
        assert_same(model(x), folded(x), 1e-4)
    return x
