"""Modules that run several times, in another order than defined, or with hooks on them."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold

from .reference_blocks import assert_same
from .small_networks import Net, conv, convs_of, example, fold_and_compare, norms_of


def test_conv_called_twice__each_output_has_its_own_norm(randomise):
    def way(m, x):
        return F.relu(m.n1(m.conv(x))) + F.relu(m.n2(m.conv(x.flip(3))))

    model = Net(way, conv=conv(), n1=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(4))
    fold_and_compare(model, example(), randomise)


def test_conv_called_twice__equal_norms_do_not_change_the_structure(randomise):
    def way(m, x):
        return F.relu(m.n1(m.conv(x))) + F.relu(m.n2(m.conv(x.flip(3))))

    def net():
        members = {"conv": conv(), "n1": nn.BatchNorm2d(4), "n2": nn.BatchNorm2d(4)}
        return Net(way, **members).double().eval()

    fresh, _ = fold(net(), example())  # Both norms are as yet the same map.
    trained, _ = fold(randomise(net()), example())
    fresh.load_state_dict(trained.state_dict(), strict=True)
    x = example()
    assert_same(trained(x).detach(), fresh(x).detach())


def test_conv_called_twice__one_output_has_a_norm(randomise):
    model = Net(
        lambda m, x: F.relu(m.norm(m.conv(F.relu(m.conv(x))))), conv=conv(), norm=nn.BatchNorm2d(4)
    )
    fold_and_compare(model, example(), randomise)


def test_conv_and_norm_called_twice(randomise):
    model = Net(
        lambda m, x: m.norm(m.conv(F.relu(m.norm(m.conv(x))))), conv=conv(), norm=nn.BatchNorm2d(4)
    )
    fold_and_compare(model, example(), randomise)


def test_conv_called_twice_in_a_row_then_a_norm(randomise):
    model = Net(lambda m, x: m.norm(m.conv(m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(4))
    fold_and_compare(model, example(), randomise)


@pytest.mark.parametrize("rank", [2, 3])
def test_linear_and_norm__square(rank, randomise):
    # BatchNorm1d's channels are axis 1: those of the linear layer for (N, C), not for (N, L, C).
    model = randomise(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).double()).eval()
    x = torch.randn(5, *[6] * (rank - 1), dtype=torch.float64)
    folded, report = fold(model, x)
    assert_same(model(x).detach(), folded(x).detach())
    assert report.norms_after == len(norms_of(folded)) == len(report.kept) == (rank == 3)


def test_linear_and_norm__flattened(randomise):
    def way(m, x):
        y = m.linear(x)
        return m.norm(y.flatten(0, 1)).view_as(y)

    model = Net(way, linear=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)).double()
    model = randomise(model).eval()
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    folded, report = fold(model, x)
    y = torch.randn(3, 5, 6, dtype=torch.float64)
    assert_same([model(x).detach(), model(y).detach()], [folded(x).detach(), folded(y).detach()])
    assert report.norms_after == len(norms_of(folded)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("legacy_xception", {}),  # features by hooks of its own accord
        ("repghostnet_050", {"feature_cls": "hook"}),
    ],
)
def test_features_by_hooks(name, options, randomise):
    model = timm.create_model(name, features_only=True, **options)
    assert type(model).__name__ == "FeatureHookNet"
    model = randomise(model).double().eval()
    folded, report = fold(model, torch.zeros(1, 3, 64, 64))
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model(x), folded(x)
    assert [t.shape[1] for t in found] == list(model.feature_info.channels())
    assert_same(expected, found)
    assert report.norms_after < report.norms_before


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
def test_norm_with_activation__activation_stays(act, randomise):
    model = nn.Sequential(conv(bias=False), BatchNormAct2d(4, act_layer=act), conv())
    folded, _ = fold_and_compare(model, example(), randomise)
    assert norms_of(folded) == []
    assert [m for m in folded.modules() if isinstance(m, act)]
    assert len(convs_of(folded)) == 2


def test_norm_with_activation__in_a_branch(randomise):
    model = Net(
        lambda m, x: m.a(x) + m.b(x),
        a=nn.Sequential(conv(), BatchNormAct2d(4)),
        b=nn.Sequential(conv(1), BatchNormAct2d(4, apply_act=False)),
    )
    folded, _ = fold_and_compare(model, example(), randomise)
    assert norms_of(folded) == []
    assert len(convs_of(folded)) == 2


def test_child_order_is_not_data_flow(randomise):
    members = {"n1": nn.BatchNorm2d(4), "c2": conv(), "c1": conv(), "n2": nn.BatchNorm2d(4)}
    model = Net(lambda m, x: m.n2(m.c2(F.relu(m.n1(m.c1(x))))), **members)
    folded, _ = fold_and_compare(model, example(), randomise)
    assert norms_of(folded) == []
    model = Net(lambda m, x: m.c1(F.relu(m.c2(F.relu(m.n2(m.n1(x)))))), **members)
    fold_and_compare(model, example(), randomise)


def test_norm_without_its_conv(randomise):
    # Registered side by side, never run one after the other.
    model = Net(lambda m, x: F.relu(m.conv(x)) * m.norm(x), conv=conv(), norm=nn.BatchNorm2d(4))
    fold_and_compare(model, example(), randomise)
