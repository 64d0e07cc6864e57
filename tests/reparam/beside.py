"""The branches of an online network run beside their convs: an independent computation."""

import copy

import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import nn
from torch.nn.utils import parametrize

from tinydet.reparam.branches import ChannelScale
from tinydet.reparam.module_class import class_of


class Beside(nn.Module):
    """A conv whose branches' outputs are added to its own, with the weights of an online conv."""

    def __init__(self, conv):
        super().__init__()
        (self.kernels,) = copy.deepcopy(conv.parametrizations["weight"])
        self.weight = nn.Parameter(conv.parametrizations.weight.original.detach().clone())
        self.bias = copy.deepcopy(conv.bias)
        self.kind, self.padding = class_of(conv), conv.padding
        self.geometry = conv.kernel_size, conv.stride, conv.dilation, conv.groups
        # The branches of these get the padded input; see `expand`.
        odd = any((k - 1) * d % 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        self.pads = self.kind is Conv2dSame or (self.padding == "same" and odd)

    def forward(self, x):
        size, stride, dilation, groups = self.geometry
        if self.pads:
            x = pad_same(x, list(size), list(stride), list(dilation))
        padding = 0 if self.pads else self.padding
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        for branch in self.kernels.branches:
            y = y + branch(x)
        return y


def beside(model):
    """Return a copy of an online network that runs its branches beside the convs."""
    model = copy.deepcopy(model)
    if parametrize.is_parametrized(model):
        return Beside(model)
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            model.set_submodule(name, Beside(module))
    return model


def renamed(name):
    """Return the name that a parameter of an online network has in its `beside` form."""
    return name.replace("parametrizations.weight.original", "weight").replace(
        "parametrizations.weight.0.branches", "kernels.branches"
    )


def small_network():
    """Return a network of dense, depthwise, grouped and dilated convs of several paddings."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, 1, 2, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, (3, 5), padding=(2, 4), groups=2, dilation=2),
        nn.ReLU(),
        Conv2dSame(12, 12, 7, 2),
    )


def random_scales(model):
    """Give all scales of branches a random value, and return the network."""
    for module in model.modules():
        if isinstance(module, ChannelScale):
            nn.init.normal_(module.weight)
    return model
