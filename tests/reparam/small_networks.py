"""Small networks for the tests of `fold`, and the check that all of them share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tinydet.reparam import fold

from .reference_blocks import assert_same

_SIZES = ((2, 9, 9), (1, 1, 1), (3, 4, 7))  # (B, H, W)


class Net(nn.Module):
    """Members in the order given, connected by a function: the two orders need not agree."""

    def __init__(self, way, **members):
        super().__init__()
        self.way = way
        for name, member in members.items():
            self.add_module(name, member)

    def forward(self, x):
        return self.way(self, x)


def conv(kernel=3, channels=4, **kwargs):
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, **kwargs)


class WithChecks(nn.Module):
    """Two branches amid checks; pytest would rewrite them in a file of tests."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv(1)

    def forward(self, x):
        assert x.shape[1] == 4, f"{x.shape[1]} channels"
        torch._assert(x.dim() == 4, "no batch")
        if x.dim() != 4 or x.size(1) < 2:
            raise ValueError(f"{x.shape}")
        if not x.shape[-1] <= 30:
            raise RuntimeError("too wide")
        a, b = self.a(x), self.b(x)
        assert a.shape == b.shape
        if len(x.shape) > 3 and x.ndim == 4:
            a = a + b
        return F.relu(a) + sum(x.shape[2:])


def norms_of(model):
    kinds = (nn.modules.batchnorm._NormBase, torch.jit.ScriptModule)
    return [m for m in model.modules() if isinstance(m, kinds) and hasattr(m, "running_var")]


def convs_of(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def fold_and_compare(model, x, randomise, sizes=_SIZES):
    """Fold a randomised float64 network and compare both at several sizes."""
    model = randomise(model.double()).eval()
    folded, report = fold(model, x)
    with torch.no_grad():
        assert_same(model(x), folded(x))
        for batch, height, width in sizes:
            other = 3 * torch.randn(batch, x.shape[1], height, width, dtype=torch.float64)
            assert_same(model(other), folded(other))
    assert report.norms_after == len(norms_of(folded))
    return folded, report


def example(channels=4):
    return torch.randn(2, channels, 9, 9, dtype=torch.float64)


class _Reads(TorchDispatchMode):
    """Memory that any operation is given."""

    def __init__(self):
        super().__init__()
        self.memory = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.memory.add(value.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def check_nothing_unused(model, x):
    """Every tensor a module holds is in its state, and read in a forward pass."""
    with torch.no_grad(), _Reads() as reads:
        model(x)
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        held = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")}
        for value in torch.utils._pytree.tree_leaves(held):
            assert not isinstance(value, torch.Tensor) or id(value) in known, name
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.untyped_storage().data_ptr() in reads.memory, key
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{key} is part of more memory"
