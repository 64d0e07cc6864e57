"""Ways to write the sum of branches, and layers whose sizes are given in other forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold

from .reference_blocks import assert_same, dense_kernel, equivalent_conv
from .small_networks import Net, conv, convs_of, example, fold_and_compare, norms_of

_SIZES = ((2, 9, 9), (1, 1, 1), (3, 4, 7), (1, 17, 17), (2, 16, 12))


def _net(way, **members):
    torch.manual_seed(0)
    usual = {"a": nn.Sequential(conv(3), nn.BatchNorm2d(4)), "b": conv(1), "c": nn.BatchNorm2d(4)}
    return nn.Sequential(Net(way, **{**usual, **members}), nn.ReLU()).double()


def _stacked(m, x):
    return torch.stack([m.a(x), m.b(x), m.c(x), x])


# The same sum m.a(x) + m.b(x) + m.c(x) + x.
_SUMS = {
    "stack and sum": lambda m, x: _stacked(m, x).sum(0),
    "torch.sum": lambda m, x: torch.sum(_stacked(m, x), dim=0),
    "last axis": lambda m, x: torch.stack([m.a(x), m.b(x), m.c(x), x], dim=-1).sum(-1),
    "mean of four": lambda m, x: 4 * _stacked(m, x).mean(dim=0),
    "torch.add": lambda m, x: torch.add(torch.add(m.a(x), m.b(x)), torch.add(x, m.c(x))),
    "alpha": lambda m, x: torch.add(m.a(x) + x, m.b(x) + m.c(x), alpha=1.0),
    "in place": lambda m, x: m.a(x).add_(m.b(x)).add_(m.c(x)).add_(x),
    "python's sum": lambda m, x: sum([m.a(x), m.b(x), m.c(x), x]),
    "zeros first": lambda m, x: torch.zeros_like(x) + m.a(x) + m.b(x) + m.c(x) + x,
    "less the negative": lambda m, x: m.a(x) - (-m.b(x)) - m.c(x).neg() + x,
}


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("form", _SUMS)
def test_form_of_sum__one_conv(form, nonlinear, randomise):
    # With an activation in the same code, only a part of the code is merged.
    way = _SUMS[form]
    model = _net((lambda m, x: way(m, x).tanh()) if nonlinear else way)
    folded, report = fold_and_compare(model, example(), randomise, _SIZES)
    (merged,) = convs_of(folded)
    assert norms_of(folded) == []
    assert (report.branches_before > 0, report.branches_after) == (True, 0)
    reference = Net(_SUMS["torch.add"], **dict(model[0].named_children()))
    kernel, bias = equivalent_conv(reference, 4, 1)
    assert_same(kernel, dense_kernel(merged))
    assert_same(bias, merged.bias.detach())


_NOT_SUMS = {
    "sum over the batch": lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(1),
    "sum over all": lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(),
    "mean over rows": lambda m, x: torch.stack([m.a(x), m.b(x)]).mean(3),
    "product": lambda m, x: torch.stack([m.a(x), m.b(x)]).prod(0),
    "written source": lambda m, x: (lambda y: y.add_(m.b(y)) * y)(m.a(x)),
}


@pytest.mark.parametrize("form", _NOT_SUMS)
def test_other_reductions_stay(form, randomise):
    model = _net(_NOT_SUMS[form])
    folded, _ = fold_and_compare(model, example(), randomise, _SIZES)
    assert len(convs_of(folded)) == 2


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_in_words(padding, randomise):
    def beside(m, x):
        return m.a(x) + (m.b(x) if padding == "same" else m.b(x)[:, :, 1:-1, 1:-1])

    model = _net(beside, a=nn.Conv2d(4, 4, 3, padding=padding))
    sizes = [(b, h + 3, w + 3) for b, h, w in _SIZES]
    folded, report = fold_and_compare(model, example(), randomise, sizes)
    assert [c.padding for c in convs_of(folded)] == [(1, 1) if padding == "same" else (0, 0)]
    assert report.branches_after == 0


@pytest.mark.parametrize("kernel", [2, 3])
def test_pool_with_more_windows_for_some_sizes(kernel, randomise):
    # The example of 16 x 16 does not tell: there ceil_mode makes no difference.
    pool = nn.AvgPool2d(kernel, 2, kernel // 3, ceil_mode=True, divisor_override=4)
    for size in (16, 17):
        model = _net(lambda m, x: m.b(m.pool(m.c(x))), pool=pool)
        x = torch.randn(1, 4, size, size, dtype=torch.float64)
        fold_and_compare(model, x, randomise, ((1, 17, 17), (2, 16, 15), (1, 20, 23), (1, 5, 6)))


def test_pool_whose_ceil_mode_changes_nothing_is_merged(randomise):
    pool = nn.AvgPool2d(3, 1, 1, ceil_mode=True)
    model = _net(lambda m, x: m.a(x) + m.pool(x), pool=pool)
    folded, _ = fold_and_compare(model, example(), randomise, _SIZES)
    assert len(convs_of(folded)) == 1


def _even(x):
    return F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)) if x.shape[2] % 2 else x


_PADDED = {
    "branches": lambda m, x: (lambda y: m.a(y) + m.b(y))(_even(x)),
    "series": lambda m, x: m.e(_even(m.d(x))),
    "series with a norm": lambda m, x: m.e(_even(m.c(m.b(x)))),
}


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("where", _PADDED)
def test_padding_of_odd_sizes_only(where, size, randomise):
    wide, narrow = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 4, 1)
    if where == "series with a norm":
        narrow = conv(1)
    model = _net(_PADDED[where], d=wide, e=narrow)
    x = torch.randn(1, 4, size, size, dtype=torch.float64)
    fold_and_compare(model, x, randomise, ((1, 8, 8), (2, 9, 9), (1, 7, 9), (1, 17, 17)))


class _Inference(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.b, self.c, self.end = conv(1), nn.Linear(4, 4), end

    @torch.inference_mode()
    def forward(self, x):
        y = self.end(self.a(x) + self.b(x) + x)
        return self.c(y.mean((2, 3)))


@pytest.mark.parametrize("end", [nn.ReLU(), nn.Identity(), nn.Sigmoid()])
@pytest.mark.parametrize("outer", [False, True])
def test_forward_in_inference_mode(end, outer, randomise):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(_Inference(end), nn.Tanh()).double()).eval()
    model = model if outer else model[0]
    folded, report = fold(model, example())
    assert norms_of(folded) == []
    assert len(convs_of(folded)) == 1
    assert (report.branches_before, report.branches_after) == (2, 0)
    x = torch.randn(3, 4, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_same(model(x), folded(x))
