"""Random linear networks: merged without a change of function, and never more expensive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tinydet.reparam import fold

from .random_networks import (
    CHANNELS,
    EXAMPLE,
    GROUPS,
    ODD,
    SERIES,
    SIZES,
    Sum,
    build,
    built,
    check_same,
    counted,
    runs,
)
from .reference_blocks import assert_same, dense_kernel


@given(series=SERIES, seed=st.integers(0, 1 << 20))
@settings(max_examples=50, deadline=None)
def test_linear_stretch__same_function_and_never_dearer(series, seed):
    torch.manual_seed(seed)
    stages = [build(plan) for plan in series]
    model = built(*stages, nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1))
    x = torch.randn(EXAMPLE, dtype=torch.float64)
    assume(runs(model, x))
    folded, report = fold(model, x)
    check_same(model, folded, (EXAMPLE, *SIZES))
    assert report.macs_after <= report.macs_before
    (before, kinds_before), (after, kinds_after) = counted(model, x), counted(folded, x)
    assert after <= before
    assert kinds_after == kinds_before == {"relu": 1}
    assert sum(p.numel() for p in folded.parameters()) == report.params_after


@st.composite
def _parallel(draw):
    """A kernel x kernel conv, and branches that fit into it."""
    kernel, stride, groups = draw(ODD), draw(st.sampled_from([1, 1, 2])), draw(GROUPS)
    out = draw(st.sampled_from([CHANNELS, 2 * CHANNELS]))
    fits = st.sampled_from([k for k in (1, 3, 5, 7) if k <= kernel])

    def conv(size, dilation, groups):
        return ("conv", size, dilation, groups, draw(st.booleans()), draw(st.booleans()))

    branches = [conv((kernel, kernel), 1, groups)]
    for _ in range(draw(st.integers(0, 4))):
        kinds = ["conv", "conv"]
        if stride == 1 and out == CHANNELS:
            kinds += ["norm", "identity", "norm"]
        kind = draw(st.sampled_from(kinds))
        if kind == "conv":
            size = (draw(fits), draw(fits))
            most = min((kernel - 1) // (k - 1) for k in (*size, 2) if k > 1)
            dilation = draw(st.integers(1, max(1, min(most, 3))))
            finer = st.sampled_from([g for g in (1, 2, CHANNELS) if g % groups == 0])
            branches.append(conv(size, dilation, draw(finer)))
        else:
            branches.append((kind,))
    order = draw(st.permutations(range(len(branches))))
    factors = draw(st.lists(st.sampled_from([1, 1, -1, 0.5]), min_size=5, max_size=5))
    return kernel, stride, groups, out, [(branches[i], factors[i]) for i in order]


class _Branches(nn.Module):
    def __init__(self, stride, out, branches):
        super().__init__()
        self.branches, self.norms = nn.ModuleList(), nn.ModuleList()
        self.factors = [factor for _, factor in branches]
        for (kind, *rest), _ in branches:
            body = nn.Identity()
            if kind == "conv":
                size, dilation, groups, bias, _ = rest
                pad = tuple(dilation * (k // 2) for k in size)
                body = nn.Conv2d(CHANNELS, out, size, stride, pad, dilation, groups, bias)
            normed = kind == "norm" or (kind == "conv" and rest[-1])
            self.branches.append(body)
            self.norms.append(nn.BatchNorm2d(out) if normed else nn.Identity())

    def forward(self, x):
        y = None
        for branch, norm, factor in zip(self.branches, self.norms, self.factors, strict=True):
            z = norm(branch(x))
            if y is None:
                y = z if factor == 1 else z * factor
            elif factor == -1:
                y = y - z
            else:
                y = y + (z if factor == 1 else factor * z)
        return y

    def kernel_and_bias(self, kernel, out):
        """Sum the kernels by hand: each in the middle of one of kernel x kernel."""
        total, shift = np.zeros((out, CHANNELS, kernel, kernel)), np.zeros(out)
        for body, norm, factor in zip(self.branches, self.norms, self.factors, strict=True):
            own, bias = np.zeros_like(total), np.zeros(out)
            middle = kernel // 2
            if isinstance(body, nn.Conv2d):
                weight = body.weight.detach().numpy()
                if body.bias is not None:
                    bias = body.bias.detach().numpy()
                per_in, per_out = weight.shape[1], out // body.groups
                reach = [d * (k // 2) for d, k in zip(body.dilation, body.kernel_size, strict=True)]
                for o, i, row, column in np.ndindex(weight.shape):
                    own[
                        o,
                        o // per_out * per_in + i,
                        middle - reach[0] + row * body.dilation[0],
                        middle - reach[1] + column * body.dilation[1],
                    ] = weight[o, i, row, column]
            else:
                for c in range(CHANNELS):
                    own[c, c, middle, middle] = 1.0
            if isinstance(norm, nn.BatchNorm2d):
                parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
                gamma, beta, mean, var = (p.detach().numpy() for p in parts)
                own = own * (gamma / np.sqrt(var + norm.eps)).reshape(-1, 1, 1, 1)
                bias = gamma * (bias - mean) / np.sqrt(var + norm.eps) + beta
            total, shift = total + factor * own, shift + factor * bias
        return torch.from_numpy(total), torch.from_numpy(shift)


@given(plan=_parallel(), seed=st.integers(0, 1 << 20))
@settings(max_examples=50, deadline=None)
def test_parallel_branches__one_conv_with_the_summed_kernel(plan, seed):
    kernel, stride, groups, out, branches = plan
    torch.manual_seed(seed)
    model = built(_Branches(stride, out, branches), nn.ReLU())
    folded, report = fold(model, torch.randn(EXAMPLE, dtype=torch.float64))
    convs = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 1
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    (conv,) = convs
    assert conv.kernel_size == (kernel, kernel)
    assert (conv.stride, conv.padding) == ((stride, stride), (kernel // 2, kernel // 2))
    assert (conv.dilation, conv.groups) == ((1, 1), groups)
    weight, bias = model[0].kernel_and_bias(kernel, out)
    assert_same(weight, dense_kernel(conv))
    assert_same(bias, torch.zeros_like(bias) if conv.bias is None else conv.bias.detach())
    assert (report.norms_after, report.branches_after, report.scales_after) == (0, 0, 0)
    check_same(model, folded)


@given(
    shift=st.sampled_from(["conv and norm", "norm", "bias", "constant"]),
    kernel=st.integers(2, 7),
    pad=st.integers(1, 6),
    groups=GROUPS,
    beside=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=25, deadline=None)
def test_shift_before_padding__same_function(shift, kernel, pad, groups, beside, seed):
    torch.manual_seed(seed)
    first = {
        "conv and norm": ("series", ("conv", (1, 1), 1, 1, 1, False), ("norm",)),
        "norm": ("norm",),
        "bias": ("conv", (1, 1), 1, 1, 1, True),
        "constant": ("shifted", ("identity",)),
    }[shift]
    layers = [
        build(first),
        build(("any conv", kernel, 1, pad, 1, groups)),
        nn.BatchNorm2d(CHANNELS),
    ]
    block = nn.Sequential(*layers)
    if beside:
        block = Sum(block, build(("any conv", kernel, 1, pad, 1, 1)))
    model = built(block, nn.ReLU())
    folded, report = fold(model, torch.randn(EXAMPLE, dtype=torch.float64))
    check_same(model, folded)
    assert report.macs_after <= report.macs_before


@given(series=SERIES, seed=st.integers(0, 1 << 20))
@settings(max_examples=6, deadline=None)
def test_structure_does_not_depend_on_values(series, seed):
    # Fresh norms shift by zero and weights may be all alike: no reason for another structure.
    x = torch.zeros(EXAMPLE, dtype=torch.float64)
    shapes = []
    for fill in (None, 0.0, 1.0):
        torch.manual_seed(seed)
        model = built(*(build(plan) for plan in series), nn.ReLU())
        assume(runs(model, x))
        if fill is not None:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_parameters()
                elif not list(module.children()):
                    for parameter in module.parameters(recurse=False):
                        nn.init.constant_(parameter, fill)
        folded, _ = fold(model, x)
        shapes.append({key: value.shape for key, value in folded.state_dict().items()})
    assert shapes[1] == shapes[0]
    assert shapes[2] == shapes[0]


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3)])
def test_tiny_example_does_not_hide_the_border(size):
    # On one pixel a padded 7x7 kernel is its middle, and pooling is the identity.
    torch.manual_seed(0)
    first = ("sum", ("conv", (7, 7), 1, 1, 1, True), ("average", 3, 1, False))
    model = built(build(("series", ("norm",), first, ("norm",))), nn.ReLU())
    folded, _ = fold(model, torch.zeros(1, CHANNELS, *size, dtype=torch.float64))
    check_same(model, folded)
