"""Random linear networks for property tests, and what is checked of their folds."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .reference_blocks import assert_same

CHANNELS = 4
EXAMPLE = (2, CHANNELS, 14, 13)
SIZES = ((1, CHANNELS, 1, 1), (3, CHANNELS, 2, 5), (1, CHANNELS, 6, 3), (2, CHANNELS, 19, 16))


class Sum(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a(x) + self.b(x)


class _SumInPlace(Sum):
    def forward(self, x):
        y = self.a(x) * 1.0
        y += self.b(x)
        return y


class _Difference(Sum):
    def forward(self, x):
        return self.a(x) - self.b(x)


class _Concatenation(Sum):
    def __init__(self, a, b):
        super().__init__(a, b)
        self.c = nn.Conv2d(2 * CHANNELS, CHANNELS, 1, bias=False)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


class _LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1)


class _Scaled(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a, self.gamma = a, nn.Parameter(torch.randn(CHANNELS, 1, 1))

    def forward(self, x):
        return self.gamma * self.a(x)


class _Shifted(_Scaled):
    def forward(self, x):
        return self.a(x) + self.gamma


class _Times(nn.Module):
    def __init__(self, a, factor):
        super().__init__()
        self.a, self.factor = a, factor

    def forward(self, x):
        return self.a(x) * self.factor


_COMPOSITES = {
    "sum": Sum,
    "sum in place": _SumInPlace,
    "difference": _Difference,
    "concatenation": _Concatenation,
    "series": nn.Sequential,
    "scaled": _Scaled,
    "shifted": _Shifted,
    "times": _Times,
}


def build(plan):
    """Build a plan: nested tuples of a kind and its arguments, readable when a test fails."""
    kind, *rest = plan
    if kind == "conv":
        (height, width), stride, dilation, groups, bias = rest
        pad = (dilation * (height // 2), dilation * (width // 2))
        return nn.Conv2d(CHANNELS, CHANNELS, (height, width), stride, pad, dilation, groups, bias)
    if kind == "any conv":
        return nn.Conv2d(CHANNELS, CHANNELS, *rest)
    if kind == "average":
        kernel, stride, counts = rest
        return nn.AvgPool2d(kernel, stride, kernel // 2, count_include_pad=counts)
    if kind == "pool":
        return nn.AvgPool2d(*rest)
    if kind in ("norm", "identity", "layer scale"):
        make = {"identity": nn.Identity, "layer scale": _LayerScale}
        return nn.BatchNorm2d(CHANNELS) if kind == "norm" else make[kind]()
    return _COMPOSITES[kind](*(build(p) if isinstance(p, tuple) else p for p in rest))


ODD, GROUPS = st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 2, CHANNELS])


def _convs(stride):
    kernel = st.tuples(ODD, ODD) | ODD.map(lambda k: (k, k))
    dilation = st.sampled_from([1, 1, 2])
    return st.tuples(st.just("conv"), kernel, st.just(stride), dilation, GROUPS, st.booleans())


def _averages(stride):
    return st.tuples(st.just("average"), st.sampled_from([1, 3, 5]), st.just(stride), st.booleans())


def _of(kind, *parts):
    return st.tuples(st.just(kind), *parts)


def _composed(part):
    return st.one_of(
        _of("sum", part, part),
        _of("sum in place", part, part),
        _of("difference", part, part),
        _of("concatenation", part, part),
        _of("series", part, part),
        _of("series", part, part, part),
        _of("scaled", part),
        _of("shifted", part),
        _of("times", part, st.sampled_from([2.0, -0.5, 3])),
    )


_LEAVES = st.one_of(
    _convs(1),
    _convs(1),
    _averages(1),
    st.sampled_from([("norm",), ("identity",), ("layer scale",)]),
)
_STRETCHES = st.recursive(_LEAVES, _composed, max_leaves=7)
_STRIDED = st.recursive(
    _convs(2) | _averages(2), lambda p: _of("sum", p, p) | _of("scaled", p), max_leaves=3
)
# Any kernel, stride, padding: sizes change, small inputs may be refused.
_ANY_CONVS = st.integers(1, 7).flatmap(
    lambda k: _of("any conv", st.just(k), st.integers(1, 3), st.integers(0, k), st.just(1), GROUPS)
)
_ANY_POOLS = st.integers(2, 4).flatmap(
    # kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
    lambda k: _of(
        "pool",
        *(st.just(k), st.integers(1, 3), st.integers(0, k // 2), st.booleans(), st.booleans()),
        st.sampled_from([None, None, 5]),
    )
)
SERIES = st.lists(
    st.one_of(_LEAVES, _LEAVES, _STRETCHES, _STRETCHES, _STRIDED, _ANY_CONVS, _ANY_POOLS),
    min_size=1,
    max_size=4,
)


_COUNTED = {
    *("relu", "abs", "clamp", "maximum", "hardtanh", "sigmoid", "_softmax", "pow"),
    "max_pool2d_with_indices",
}


class _Ops(TorchDispatchMode):
    """Counts multiply-adds and the operations that are not linear in the network's input."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.macs, self.not_linear = batch, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if name == "convolution":
            self.macs += out.numel() * args[1][0].numel()
        elif name in ("mm", "addmm"):
            self.macs += out.numel() * tensors[-1].shape[0]
        elif name == "avg_pool2d":
            self.macs += out.numel() * args[1][0] ** 2
        elif "batch_norm" in name:
            self.macs += out[0].numel()
            self.not_linear["norm of its own batch"] += bool(args[5])
        elif name in ("mul", "mul_", "div", "div_"):
            self.macs += out.numel()
            # Weights have no batch axis, and no test here has a batch of their first axis.
            activations = [t for t in tensors if t.ndim == 4 and t.shape[0] == self.batch]
            self.not_linear["product"] += len(activations) == 2
        if name.rstrip("_") in _COUNTED:
            self.not_linear[name.rstrip("_")] += 1
        return out


def counted(model, x):
    with torch.no_grad(), _Ops(len(x)) as ops:
        model(x)
    return ops.macs, +ops.not_linear


def built(*modules):
    """A float64 network whose norms have statistics and weights of order one and both signs."""
    model = nn.Sequential(*modules).double().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                norm.weight.normal_()
                norm.bias.normal_()
                if norm.running_mean is not None:
                    norm.running_mean.normal_()
                    norm.running_var.uniform_(0.3, 3.0)
    return model


def runs(model, x):
    try:
        with torch.no_grad():
            return model(x) is not None
    except RuntimeError:
        return False  # Smaller than a kernel without padding.


def check_same(model, folded, sizes=SIZES, scales=(1.0, -1000.0)):
    with torch.no_grad():
        for size in sizes:
            for scale in scales:
                x = scale * torch.randn(size, dtype=torch.float64)
                if runs(model, x.clone()):
                    assert_same(model(x.clone()), folded(x.clone()))


class Connected(nn.Module):
    def __init__(self, a, b, way):
        super().__init__()
        self.a, self.b, self.way = a, b, way

    def forward(self, x):
        return self.way(self.a, self.b, x)


SMALL = st.recursive(
    _convs(1)
    | st.sampled_from([("norm",), ("series", ("conv", (3, 3), 1, 1, 1, True), ("norm",))]),
    lambda p: _of("sum", p, p) | _of("scaled", p),
    max_leaves=3,
)
