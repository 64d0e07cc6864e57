"""Norms and factors on parts of one layer's output channels."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers.lambda_layer import LambdaLayer
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold
from tinydet.reparam.dataflow import observe

from .reference_blocks import assert_same
from .small_networks import Net, fold_and_compare, norms_of


def _net(way, parts=(2, 4, 2), layer=None, norm=nn.BatchNorm2d, **members):
    norms = {f"n{i}": norm(n) for i, n in enumerate(parts)}
    return Net(way, conv=layer or nn.Conv2d(4, 8, 3, padding=1, bias=False), **norms, **members)


def _split(m, x):
    return m.conv(x).split([2, 4, 2], 1)


# Norms of disjoint channels; the number of norms that stay.
_PARTS = {
    "all parts": (
        lambda m, x: [n(y) for n, y in zip((m.n0, m.n1, m.n2), _split(m, x), strict=True)],
        0,
    ),
    "others without a norm": (
        lambda m, x: (lambda a, b, c: [m.n0(a), b.relu(), m.n2(c).exp()])(*_split(m, x)),
        0,
    ),
    "others used twice": (
        lambda m, x: (lambda a, b, c: [m.n0(a), b.relu(), b.exp(), c])(*_split(m, x)),
        0,
    ),
    "others returned": (lambda m, x: (lambda a, b, c: [m.n0(a), b, m.n2(c)])(*_split(m, x)), 0),
    "others not used": (lambda m, x: m.n1(_split(m, x)[1]), 0),
    "sliced": (lambda m, x: (lambda y: [m.n0(y[:, ::4]), m.n1(y[:, [1, 2, 3, 5]])])(m.conv(x)), 1),
    "strided": (lambda m, x: (lambda y: [m.n1(y[:, ::2]), y[:, 1::2].relu()])(m.conv(x)), 0),
    "interleaved by a view": (
        lambda m, x: (lambda y: [m.n1(y[:, :, 0]), y[:, :, 1]])(
            m.conv(x).view(len(x), 4, 2, *x.shape[2:])
        ),
        0,
    ),
    "put together again": (
        lambda m, x: (lambda a, b, c: F.relu(torch.cat([m.n2(c), m.n1(b), m.n0(a)], 1)))(
            *_split(m, x)
        ),
        0,
    ),
    "sum with another layer": (
        lambda m, x: (lambda y: [m.n1(y[:, 2:6] + m.other(x.relu())), y[:, :2], y[:, 6:]])(
            m.conv(x)
        ),
        0,
    ),
    "one norm for two halves": (
        lambda m, x: (lambda a, b: m.n1(a).exp() + m.n1(b).relu())(*m.conv(x).chunk(2, 1)),
        0,
    ),
    "also read as a whole": (lambda m, x: (lambda y: [m.n0(y[:, :2]), y.relu()])(m.conv(x)), 1),
    "also returned as a whole": (lambda m, x: (lambda y: [m.n0(y[:, :2]), y])(m.conv(x)), 1),
    "also partly read": (
        lambda m, x: (lambda y: [m.n0(y[:, :2]), y[:, 1:].relu()])(m.conv(x)),
        1,
    ),
    "overlapping norms": (
        lambda m, x: (lambda y: [m.n1(y[:, :4]), m.n1(y[:, 3:7])])(m.conv(x)),
        1,
    ),
    "other places of the same channels": (
        lambda m, x: (lambda y: [m.n0(y[:, :2, 1:]), y[:, :, :1]])(m.conv(x)),
        1,
    ),
    "others changed in place": (
        lambda m, x: (lambda y: [m.n0(y[:, :2]), y[:, 2:].relu_()])(m.conv(x)),
        1,
    ),
    "changed in place together": (lambda m, x: m.n0(m.conv(x).relu_()[:, :2]), 1),
    "other places than those changed in place": (
        lambda m, x: (lambda y: (y[:, :2, :2].add_(1), m.n0(y[:, :2, :2]), y[:, :, 2:].relu())[1:])(
            m.conv(x)
        ),
        1,
    ),
    "written into before": (
        lambda m, x: (lambda y: (y[:, 1:3].mul_(x[:, :2]), m.n0(y[:, :2])))(m.conv(x))[1],
        1,
    ),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", _PARTS)
def test_norms_of_parts_of_a_conv(name, bias, randomise):
    way, left = _PARTS[name]
    model = _net(way, layer=nn.Conv2d(4, 8, 3, padding=1, bias=bias), other=nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    used = {c.name for c in observe(model.double().eval(), (x,), lambda _: False).calls}
    for n in ("n0", "n1", "n2", "other"):
        if n not in used:
            delattr(model, n)
    folded, report = fold_and_compare(model, x, randomise, ((1, 5, 8), (3, 4, 4), (2, 13, 6)))
    assert report.norms_after == len(norms_of(folded)) == left
    assert all("changes by" not in step.detail for step in report.kept)


@pytest.mark.parametrize("layer", ["linear", "grouped", "transposed", "3d"])
def test_norms_of_parts_of_other_layers(layer, randomise):
    conv, norm, shape = {
        "linear": (nn.Linear(4, 8), nn.BatchNorm1d, (5, 4)),
        "grouped": (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d, (2, 4, 6, 5)),
        "transposed": (nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d, (2, 4, 6, 5)),
        "3d": (nn.Conv3d(4, 8, 2), nn.BatchNorm3d, (2, 4, 5, 4, 6)),
    }[layer]
    way = _PARTS["others without a norm"][0]
    model = _net(way, layer=conv, norm=norm)
    del model.n1
    model = randomise(model.double()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    folded, report = fold(model, x)
    assert report.norms_after == 0
    with torch.no_grad():
        assert_same(model(x), folded(x))


def test_norm_of_a_part__weights(randomise):
    """The rows of the part are those of the closed form, all others are untouched."""
    model = Net(
        lambda m, x: (lambda y: [m.n1(y[:, 2:6]), y[:, :2].relu()])(m.conv(x)),
        conv=nn.Conv2d(4, 8, 1),
        n1=nn.BatchNorm2d(4),
    )
    model = randomise(model.double()).eval()
    folded, _ = fold(model, torch.zeros(1, 4, 5, 5))
    scale = model.n1.weight / (model.n1.running_var + model.n1.eps).sqrt()
    weight, bias = model.conv.weight.clone(), model.conv.bias.clone()
    weight[2:6] *= scale[:, None, None, None]
    bias[2:6] = scale * (bias[2:6] - model.n1.running_mean) + model.n1.bias
    torch.testing.assert_close(folded.conv.weight, weight)
    torch.testing.assert_close(folded.conv.bias, bias)
    assert torch.equal(folded.conv.weight[:2], model.conv.weight[:2])


def test_norms_of_parts__fresh_and_trained_have_one_structure(randomise):
    def net():
        return _net(_PARTS["one norm for two halves"][0]).double().eval()

    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    fresh, _ = fold(net(), x)
    trained, _ = fold(randomise(net()), x)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    with torch.no_grad():
        assert_same(trained(x), fresh(x))


def test_factor_on_a_part(randomise):
    model = Net(
        lambda m, x: (lambda y: [y[:, :3] * m.g, y[:, 3:].relu()])(m.conv(x)),
        conv=nn.Conv2d(4, 8, 1),
    )
    model.g = nn.Parameter(torch.randn(3, 1, 1))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded, report = fold_and_compare(model, x, randomise)
    assert "g" not in dict(folded.named_parameters())
    assert [s.name for s in report.folded] == ["mul in the network (1)"]


@pytest.mark.parametrize("r", [None, 3])
def test_lambda_layer(r, randomise):
    layer = LambdaLayer(16, feat_size=(6, 5) if r is None else None, r=r, num_heads=2, dim_head=8)
    model = randomise(nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), layer).double()).eval()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    folded, report = fold(model, x)
    assert (report.norms_before, report.norms_after) == (2, 0)
    with torch.no_grad():
        assert_same(model(x), folded(x))


@pytest.mark.slow
def test_lambda_network(randomise):
    model = randomise(timm.create_model("lambda_resnet26rpt_256")).double().eval()
    _, report = fold(model, torch.zeros(1, 3, 256, 256, dtype=torch.float64))
    # Those behind attention: their input is a product of two activations.
    assert [s.name.rsplit(".", 1)[1] for s in report.kept] == ["post_attn"] * 3
