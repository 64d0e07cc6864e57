"""A block with parallel branches, used and configured in unusual ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold

from .reference_blocks import assert_same
from .small_networks import Net, conv, example, fold_and_compare, norms_of


class _Fork(nn.Module):
    """Two branches that can be merged, in a module that others may look into."""

    def __init__(self):
        super().__init__()
        self.stride, self.gain = 1, 3.0
        self.a = nn.Sequential(conv(bias=False), nn.BatchNorm2d(4))
        self.b = nn.Sequential(conv(1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x, gate=None):
        y = self.a(x) + self.b(x)
        return y if gate is None else y * gate.sigmoid()

    def doubled(self, x):
        return 2 * self(x)


class _ForkOfTensors(_Fork):
    def forward(self, x):
        y = self.a(x) + self.b(x)
        return y if isinstance(x, torch.Tensor) else 5 * y  # Not a tensor while it is traced.


class _ForkTimes(_Fork):
    def forward(self, x, factor):
        return self.a(x) * factor + self.b(x)


# How a network may use a block beside calling it with one tensor.
_USES = {
    "weight's dtype": lambda m, x: F.relu(m.fork(x.to(m.fork.a[0].weight.dtype))),
    "plain value": lambda m, x: F.relu(m.fork(x))[:, :, :: m.fork.stride] * m.fork.gain,
    "method": lambda m, x: F.relu(m.fork.doubled(x)),
    "branch alone": lambda m, x: F.relu(m.fork(x)) + m.fork.a(F.relu(x)),
    "keyword": lambda m, x: F.relu(m.fork(x=x)),
    "argument the second time": lambda m, x: m.fork(F.relu(m.fork(x)), x),
    "argument the first time": lambda m, x: m.fork(F.relu(m.fork(x, x))),
    "isinstance": lambda m, x: F.relu(m.of_tensors(x)),
    "number": lambda m, x: F.relu(m.times(x, 3)),
    "another number the second time": lambda m, x: m.times(F.relu(m.times(x, 1)), 2.5),
    "number from the size": lambda m, x: F.relu(m.times(x, x.shape[2])),
    "same tensor twice": lambda m, x: m.times(F.relu(m.times(x, x.mean())), F.relu(x)),
    "path by size": lambda m, x: F.relu(m.fork(x)) if x.shape[2] > 5 else m.fork(F.relu(x)),
}


@pytest.mark.parametrize("use", _USES)
def test_block_used_in_an_unusual_way(use, randomise):
    model = Net(_USES[use], fork=_Fork(), of_tensors=_ForkOfTensors(), times=_ForkTimes())
    fold_and_compare(model, example(), randomise)


def _doubles(module, args, output):
    del module, args
    return 2 * output


def _adds_its_input(module, args, output):
    del module
    return args[0] + output


def _doubles_input(module, args):
    del module
    return (2 * args[0],)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["fork", "fork.a", "fork.b.0", "fork.a.1"])
@pytest.mark.parametrize("hook", [_doubles, _adds_its_input, _doubles_input])
def test_hooks_that_change_tensors(where, hook, randomise):
    model = Net(lambda m, x: F.relu(m.fork(x)), fork=_Fork())
    module = model.get_submodule(where)
    if hook is _doubles_input:
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)
    fold_and_compare(model, example(), randomise)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_parametrized_weight(norm, randomise):
    fork = _Fork()
    getattr(nn.utils.parametrizations, norm)(fork.a[0])
    fold_and_compare(nn.Sequential(fork, nn.ReLU()), example(), randomise)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode(mode, randomise):
    fork = _Fork()
    fork.a[0] = conv(padding_mode=mode)
    fold_and_compare(
        nn.Sequential(fork, nn.ReLU()), example(), randomise, sizes=((1, 4, 7), (3, 9, 2))
    )


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_same_padding(kernel, randomise):
    # With an even kernel it is asymmetric, which no padding of nn.Conv2d is.
    fork = _Fork()
    fork.a[0] = nn.Conv2d(4, 4, kernel, padding="same")
    fold_and_compare(nn.Sequential(fork, nn.ReLU()), example(), randomise)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_dimensions(axes, randomise):
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
    fork = _Fork()
    fork.a = nn.Sequential(conv(4, 4, 3, padding=1), norm(4))
    fork.b = nn.Sequential(conv(4, 4, 1), norm(4))
    model = randomise(nn.Sequential(fork, nn.ReLU()).double()).eval()
    folded, _ = fold(model, torch.randn(2, 4, *[6] * axes, dtype=torch.float64))
    assert norms_of(folded) == []
    for size in (1, 2, 7):
        x = torch.randn(3, 4, *[size] * axes, dtype=torch.float64)
        assert_same(model(x).detach(), folded(x).detach())


def test_image_without_a_batch_axis(randomise):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv(1)

        def forward(self, x):
            return F.relu(self.a(x) + self.b(x))

    model = randomise(Sum().double()).eval()
    for images in (torch.randn(4, 9, 9), torch.randn(2, 4, 9, 9)):
        folded, _ = fold(model, images)
        for x in (torch.randn(4, 5, 3).double(), torch.randn(3, 4, 5, 3).double()):
            assert_same(model(x).detach(), folded(x).detach())


def test_two_inputs_that_are_one_tensor_in_the_example(randomise):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv(1)

        def forward(self, x, y):
            return F.relu(self.a(x) + self.b(y))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x, y):
            return self.two(self.two(x, x), y)

    x, y = example(), example()
    for model in (Two(), Outer()):
        model = randomise(model.double()).eval()
        folded, _ = fold(model, (x, x))
        assert_same(model(x, y).detach(), folded(x, y).detach())
