"""Random stretches of networks: the linear ones are merged, never changed; others never merged."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tinydet.reparam import fold

from .reference_blocks import assert_same, dense_kernel

_C = 4
_EXAMPLE = (2, _C, 14, 13)
_SIZES = ((1, _C, 1, 1), (3, _C, 2, 5), (1, _C, 6, 3), (2, _C, 19, 16))


class _Sum(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a(x) + self.b(x)


class _SumInPlace(_Sum):
    def forward(self, x):
        y = self.a(x) * 1.0
        y += self.b(x)
        return y


class _Difference(_Sum):
    def forward(self, x):
        return self.a(x) - self.b(x)


class _Concatenation(_Sum):
    def __init__(self, a, b):
        super().__init__(a, b)
        self.c = nn.Conv2d(2 * _C, _C, 1, bias=False)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


class _LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(_C))

    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1)


class _Scaled(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a, self.gamma = a, nn.Parameter(torch.randn(_C, 1, 1))

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
    "sum": _Sum,
    "sum in place": _SumInPlace,
    "difference": _Difference,
    "concatenation": _Concatenation,
    "series": nn.Sequential,
    "scaled": _Scaled,
    "shifted": _Shifted,
    "times": _Times,
}


def _module(plan):
    """Build a plan: nested tuples of a kind and its arguments, readable when a test fails."""
    kind, *rest = plan
    if kind == "conv":
        (height, width), stride, dilation, groups, bias = rest
        pad = (dilation * (height // 2), dilation * (width // 2))
        return nn.Conv2d(_C, _C, (height, width), stride, pad, dilation, groups, bias)
    if kind == "any conv":
        return nn.Conv2d(_C, _C, *rest)
    if kind == "average":
        kernel, stride, counts = rest
        return nn.AvgPool2d(kernel, stride, kernel // 2, count_include_pad=counts)
    if kind == "pool":
        return nn.AvgPool2d(*rest)
    if kind in ("norm", "identity", "layer scale"):
        make = {"identity": nn.Identity, "layer scale": _LayerScale}
        return nn.BatchNorm2d(_C) if kind == "norm" else make[kind]()
    return _COMPOSITES[kind](*(_module(p) if isinstance(p, tuple) else p for p in rest))


_ODD, _GROUPS = st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 2, _C])


def _convs(stride):
    kernel = st.tuples(_ODD, _ODD) | _ODD.map(lambda k: (k, k))
    dilation = st.sampled_from([1, 1, 2])
    return st.tuples(st.just("conv"), kernel, st.just(stride), dilation, _GROUPS, st.booleans())


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
    lambda k: _of("any conv", st.just(k), st.integers(1, 3), st.integers(0, k), st.just(1), _GROUPS)
)
_ANY_POOLS = st.integers(2, 4).flatmap(
    # kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
    lambda k: _of(
        "pool",
        *(st.just(k), st.integers(1, 3), st.integers(0, k // 2), st.booleans(), st.booleans()),
        st.sampled_from([None, None, 5]),
    )
)
_SERIES = st.lists(
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


def _counted(model, x):
    with torch.no_grad(), _Ops(len(x)) as ops:
        model(x)
    return ops.macs, +ops.not_linear


def _built(*modules):
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


def _runs(model, x):
    try:
        with torch.no_grad():
            return model(x) is not None
    except RuntimeError:
        return False  # Smaller than a kernel without padding.


def _check_same(model, folded, sizes=_SIZES, scales=(1.0, -1000.0)):
    with torch.no_grad():
        for size in sizes:
            for scale in scales:
                x = scale * torch.randn(size, dtype=torch.float64)
                if _runs(model, x.clone()):
                    assert_same(model(x.clone()), folded(x.clone()))


@given(series=_SERIES, seed=st.integers(0, 1 << 20))
@settings(max_examples=75, deadline=None)
def test_linear_stretch__same_function_and_never_dearer(series, seed):
    torch.manual_seed(seed)
    stages = [_module(plan) for plan in series]
    model = _built(*stages, nn.ReLU(), nn.Conv2d(_C, _C, 1))
    x = torch.randn(_EXAMPLE, dtype=torch.float64)
    assume(_runs(model, x))
    folded, report = fold(model, x)
    _check_same(model, folded, (_EXAMPLE, *_SIZES))
    assert report.macs_after <= report.macs_before
    (before, kinds_before), (after, kinds_after) = _counted(model, x), _counted(folded, x)
    assert after <= before
    assert kinds_after == kinds_before == {"relu": 1}
    assert sum(p.numel() for p in folded.parameters()) == report.params_after


@st.composite
def _parallel(draw):
    """A kernel x kernel conv, and branches that fit into it."""
    kernel, stride, groups = draw(_ODD), draw(st.sampled_from([1, 1, 2])), draw(_GROUPS)
    out = draw(st.sampled_from([_C, 2 * _C]))
    fits = st.sampled_from([k for k in (1, 3, 5, 7) if k <= kernel])

    def conv(size, dilation, groups):
        return ("conv", size, dilation, groups, draw(st.booleans()), draw(st.booleans()))

    branches = [conv((kernel, kernel), 1, groups)]
    for _ in range(draw(st.integers(0, 4))):
        kinds = ["conv", "conv"]
        if stride == 1 and out == _C:
            kinds += ["norm", "identity", "norm"]
        kind = draw(st.sampled_from(kinds))
        if kind == "conv":
            size = (draw(fits), draw(fits))
            most = min((kernel - 1) // (k - 1) for k in (*size, 2) if k > 1)
            dilation = draw(st.integers(1, max(1, min(most, 3))))
            finer = st.sampled_from([g for g in (1, 2, _C) if g % groups == 0])
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
                body = nn.Conv2d(_C, out, size, stride, pad, dilation, groups, bias)
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
        total, shift = np.zeros((out, _C, kernel, kernel)), np.zeros(out)
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
                for c in range(_C):
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
    model = _built(_Branches(stride, out, branches), nn.ReLU())
    folded, report = fold(model, torch.randn(_EXAMPLE, dtype=torch.float64))
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
    _check_same(model, folded)


@given(
    shift=st.sampled_from(["conv and norm", "norm", "bias", "constant"]),
    kernel=st.integers(2, 7),
    pad=st.integers(1, 6),
    groups=_GROUPS,
    beside=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=50, deadline=None)
def test_shift_before_padding__same_function(shift, kernel, pad, groups, beside, seed):
    torch.manual_seed(seed)
    first = {
        "conv and norm": ("series", ("conv", (1, 1), 1, 1, 1, False), ("norm",)),
        "norm": ("norm",),
        "bias": ("conv", (1, 1), 1, 1, 1, True),
        "constant": ("shifted", ("identity",)),
    }[shift]
    layers = [_module(first), _module(("any conv", kernel, 1, pad, 1, groups)), nn.BatchNorm2d(_C)]
    block = nn.Sequential(*layers)
    if beside:
        block = _Sum(block, _module(("any conv", kernel, 1, pad, 1, 1)))
    model = _built(block, nn.ReLU())
    folded, report = fold(model, torch.randn(_EXAMPLE, dtype=torch.float64))
    _check_same(model, folded)
    assert report.macs_after <= report.macs_before


def _pooled_softmax(y):
    return torch.softmax(y.mean((2, 3), keepdim=True), 1)


# How two linear stretches a and b are connected so that they are not one.
_NOT_LINEAR = {
    "relu": lambda a, b, x: b(F.relu(a(x))),
    "relu on one branch": lambda a, b, x: a(x) + F.relu(b(x)),
    "max pooling": lambda a, b, x: b(F.max_pool2d(a(x), 3, 1, 1)),
    "softmax gate": lambda a, b, x: b((lambda y: y * _pooled_softmax(y))(a(x))),
    "sigmoid gate": lambda a, b, x: a(x) * torch.sigmoid(b(x)),
    "abs": lambda a, b, x: b(a(x).abs()),
    "product": lambda a, b, x: a(x) * b(x),
    "square": lambda a, b, x: b((lambda y: y * y)(a(x))),
    "power": lambda a, b, x: b(a(x) ** 2),
    "maximum": lambda a, b, x: torch.maximum(a(x), b(x)),
    "quotient": lambda a, b, x: a(x) / (3 + b(x).abs()),
    "clamp": lambda a, b, x: b(a(x).clamp(-1, 2)),
    # On inputs of order one these two do nothing at all.
    "wide clamp": lambda a, b, x: b(a(x).clamp(-2e3, 2e3)),
    "wide hardtanh": lambda a, b, x: a(x) + F.hardtanh(b(x), -2e3, 2e3),
    "other source": lambda a, b, x: a(x) + b(F.relu(x)),
    "product with the input": lambda a, b, x: a(x) + b(x) * x,
}


class _Connected(nn.Module):
    def __init__(self, a, b, way):
        super().__init__()
        self.a, self.b, self.way = a, b, way

    def forward(self, x):
        return self.way(self.a, self.b, x)


_SMALL = st.recursive(
    _convs(1)
    | st.sampled_from([("norm",), ("series", ("conv", (3, 3), 1, 1, 1, True), ("norm",))]),
    lambda p: _of("sum", p, p) | _of("scaled", p),
    max_leaves=3,
)


def _connected(way, a, b, seed):
    torch.manual_seed(seed)
    return _built(_Connected(_module(a), _module(b), way))


@pytest.mark.parametrize("way", _NOT_LINEAR)
@given(a=_SMALL, b=_SMALL, seed=st.integers(0, 1 << 20))
@settings(max_examples=8, deadline=None)
def test_non_linear__never_merged(way, a, b, seed):
    model = _connected(_NOT_LINEAR[way], a, b, seed)
    x = torch.randn(_EXAMPLE, dtype=torch.float64)
    folded, report = fold(model, x)
    _check_same(model, folded, scales=(1.0, 1e5, -1e5))
    kinds = _counted(model, x)[1]
    assert kinds
    assert _counted(folded, x)[1] == kinds
    assert report.macs_after <= report.macs_before


# Tensors inside a stretch that something else sees as well.
_SEEN = {
    "second consumer": lambda a, b, x: (lambda y: b(y) * F.relu(y))(a(x)),
    "mean of it": lambda a, b, x: (lambda y: F.relu(b(y)) + y.mean((2, 3), keepdim=True))(a(x)),
    "returned": lambda a, b, x: (lambda y: (b(y), y))(a(x)),
    "returned as a view": lambda a, b, x: (lambda y: (b(y), y.flatten(2)))(a(x)),
    "branch returned": lambda a, b, x: (lambda y: (F.relu(y + b(x)), y))(a(x)),
    "written to afterwards": lambda a, b, x: (lambda y: (b(y), y.mul_(2)))(a(x)),
}


@pytest.mark.parametrize("way", _SEEN)
@given(a=_SMALL, b=_SMALL, seed=st.integers(0, 1 << 20))
@settings(max_examples=8, deadline=None)
def test_seen_tensor_keeps_its_values(way, a, b, seed):
    model = _connected(_SEEN[way], a, b, seed)
    x = torch.randn(_EXAMPLE, dtype=torch.float64)
    folded, report = fold(model, x)
    _check_same(model, folded)
    # A branch that is needed anyway is not computed twice.
    assert report.macs_after <= report.macs_before
    assert _counted(folded, x)[0] <= _counted(model, x)[0]


@pytest.mark.parametrize("changes", [False, True])
@given(
    a=_SMALL,
    b=_SMALL,
    way=st.sampled_from([lambda a, b, x: b(a(x)), lambda a, b, x: a(x) + b(x)]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=8, deadline=None)
def test_hook_inside_a_stretch_sees_the_same(changes, a, b, way, seed):
    seen = []

    def hook(module, args, output):
        del module, args
        seen.append(output.detach().clone())
        return output * 2 if changes else None

    torch.manual_seed(seed)
    model = _built(_Connected(_module(a), _module(b), way), nn.ReLU())
    model[0].a.register_forward_hook(hook)
    folded, _ = fold(model, torch.randn(_EXAMPLE, dtype=torch.float64))
    for size in _SIZES:
        x = torch.randn(size, dtype=torch.float64)
        seen.clear()
        with torch.no_grad():
            outputs = model(x), folded(x)
        assert len(seen) == 2
        assert_same(seen[0], seen[1])
        assert_same(*outputs)


def test_norm_of_its_own_batch_stays():
    torch.manual_seed(0)
    for way in (lambda a, b, x: b(a(x)), lambda a, b, x: a(x) + b(x)):
        own = nn.Sequential(nn.BatchNorm2d(_C, track_running_stats=False), nn.Conv2d(_C, _C, 1))
        conv = nn.Sequential(nn.Conv2d(_C, _C, 3, padding=1), nn.BatchNorm2d(_C))
        model = _built(_Connected(conv, own, way), nn.ReLU())
        folded, report = fold(model, torch.randn(_EXAMPLE, dtype=torch.float64))
        assert report.norms_after == 1
        assert len(report.kept) == 1
        _check_same(model, folded, _SIZES[1:], scales=(1.0, 30.0))


_CONSTANT = torch.linspace(-1, 2, _C, dtype=torch.float64).view(-1, 1, 1)
_FAR = torch.ones(64, 64, dtype=torch.float64)  # one wherever the example's pixels are
_FAR[20:, 30:] = 0.5

# Linear, but not a convolution of the input: nothing to merge with, everything to keep.
_NOT_INVARIANT = {
    "flip": lambda m, x: m.b(m.a(x).flip(3)),
    "transposed axes": lambda m, x: m.b(m.a(x).transpose(2, 3)),
    "roll": lambda m, x: m.a(x) + m.b(x).roll(1, 2),
    "shuffled channels": lambda m, x: (
        m.b(m.a(x).view(-1, 2, 2, *x.shape[2:]).mT.reshape(x.shape))
        if x.shape[2] == x.shape[3]
        else m.b(m.a(x))
    ),
    "reflected border": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), mode="reflect")),
    "replicated border": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), mode="replicate")),
    "border of ones": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)),
    "cropped": lambda m, x: m.b(m.a(x)[:, :, 1:, :-1]),
    "cropped branch": lambda m, x: m.b(x)[:, :, 1:, 1:] + m.a(x)[:, :, :-1, :-1],
    "every second pixel": lambda m, x: m.b(m.a(x)[:, :, ::2, ::2]),
    "half of the channels": lambda m, x: m.b(torch.cat([m.a(x)[:, :2], x[:, 2:]], 1)),
    "swapped halves": lambda m, x: m.b(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)),
    "enlarged": lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2)),
    "pooled to one pixel": lambda m, x: m.a(x) + m.b(F.adaptive_avg_pool2d(x, 1)),
    "other pixels' mean": lambda m, x: m.b(m.a(x) - x.mean((2, 3), keepdim=True)),
    "position": lambda m, x: m.b(m.a(x) + torch.arange(x.shape[3]).to(x)),
    "mask": lambda m, x: m.b(m.a(x) * torch.arange(x.shape[2]).to(x)[:, None]),
    "size": lambda m, x: m.b(m.a(x) / x.shape[2]) + m.a(x) * x.shape[3],
    "size of a branch": lambda m, x: m.a(x) / x.shape[2] + m.b(x),
    "size before a norm": lambda m, x: m.b(m.a[0](x) * x.shape[3]),
    "size of the batch": lambda m, x: m.a(x) / x.shape[0] + m.b(x),
    "first pixels of large images": lambda m, x: (m.a(x) + m.b(x))[:, :, :40, :40],
    "window of the source": lambda m, x: (lambda y: m.a(y) + m.b(y))(x[:, :, :40, :40]),
    "first two samples": lambda m, x: (lambda y: m.a(y) + m.b(y))(x[:2]),
    "mask that begins far away": lambda m, x: m.a(x) * _FAR[: x.shape[2], : x.shape[3]] + m.b(x),
    "tensor of no module": lambda m, x: m.a(x) * _CONSTANT + m.b(x),
    "pixels to channels and back": lambda m, x: m.b(
        F.pixel_unshuffle(F.pixel_shuffle(m.a(x), 2), 2)
    ),
    "cast to integers": lambda m, x: m.b(m.a(x).to(torch.int32).to(x.dtype)) + m.a(x),
    "batch": lambda m, x: m.b(m.a(x) * torch.arange(len(x)).to(x)[:, None, None, None]),
    "batch mean": lambda m, x: m.a(x) + m.b(x.mean(0, keepdim=True)),
    "transposed conv": lambda m, x: m.b(F.conv_transpose2d(m.a(x), m.t, stride=2)),
    "own weight": lambda m, x: m.b(m.a(x)) * m.a[0].weight.mean(),
    "weight made on the fly": lambda m, x: F.conv2d(m.a(x), m.t / m.t.norm(), padding=1) + m.b(x),
}


class _NotInvariant(nn.Module):
    def __init__(self, way, kernel):
        super().__init__()
        pad = kernel // 2
        self.a, self.b = (
            nn.Sequential(nn.Conv2d(_C, _C, kernel, padding=pad), nn.BatchNorm2d(_C))
            for _ in range(2)
        )
        self.t = nn.Parameter(torch.randn(_C, _C, 3, 3))
        self.way = way

    def forward(self, x):
        return F.relu(self.way(self, x))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("way", _NOT_INVARIANT)
def test_not_shift_invariant__same_function(way, kernel):
    torch.manual_seed(0)
    model = _built(_NotInvariant(_NOT_INVARIANT[way], kernel))
    folded, report = fold(model, torch.randn(2, _C, 12, 12, dtype=torch.float64))
    _check_same(model, folded, ((2, _C, 12, 12), (1, _C, 5, 8), (1, _C, 45, 46), *_SIZES))
    assert report.macs_after <= report.macs_before


@given(series=_SERIES, seed=st.integers(0, 1 << 20))
@settings(max_examples=12, deadline=None)
def test_structure_does_not_depend_on_values(series, seed):
    # Fresh norms shift by zero and weights may be all alike: no reason for another structure.
    x = torch.zeros(_EXAMPLE, dtype=torch.float64)
    shapes = []
    for fill in (None, 0.0, 1.0):
        torch.manual_seed(seed)
        model = _built(*(_module(plan) for plan in series), nn.ReLU())
        assume(_runs(model, x))
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


def test_uniform_map_over_positions_is_no_scale_of_channels():
    def net(value):
        torch.manual_seed(0)
        model = _built(_NotInvariant(lambda m, x: m.b(m.a(x) * m.g), 1))
        model[0].g = nn.Parameter(value.double())
        return model

    x = torch.randn(2, _C, 6, 6, dtype=torch.float64)
    uniform, _ = fold(net(torch.full((_C, 6, 6), 0.1)), x)
    trained, _ = fold(net(torch.randn(_C, 6, 6)), x)
    assert uniform.state_dict().keys() == trained.state_dict().keys()
    uniform.load_state_dict(trained.state_dict(), strict=True)
    assert_same(trained(x).detach(), uniform(x).detach())


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3)])
def test_tiny_example_does_not_hide_the_border(size):
    # On one pixel a padded 7x7 kernel is its middle, and pooling is the identity.
    torch.manual_seed(0)
    first = ("sum", ("conv", (7, 7), 1, 1, 1, True), ("average", 3, 1, False))
    model = _built(_module(("series", ("norm",), first, ("norm",))), nn.ReLU())
    folded, _ = fold(model, torch.zeros(1, _C, *size, dtype=torch.float64))
    _check_same(model, folded)
