"""Convolutions that a CPU has to compute in another way: the same function, names and weights."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydet.reparam.expand import ExpandedConv2d


def prepare_for_cpu(model: nn.Module, bfloat16: bool) -> None:
    """Give convolutions a class that trains well on a CPU; the network stays the same function.

    Strided 1x1 convolutions of few channels take every n-th pixel first: oneDNN writes past its
    workspace in their backward pass and kills the process (github.com/uxlfoundation/oneDNN, number
    6035; to be removed once torch ships the fix). In bfloat16 depthwise convolutions stay in
    float32, where the backward pass of most is several times faster; those of 1x1 without a stride,
    which scale each channel, are faster in bfloat16.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        of_1x1, strided = module.kernel_size == (1, 1), max(module.stride) > 1
        scales = of_1x1 and not strided and module.groups == module.out_channels
        plain = type(module) in (nn.Conv2d, ExpandedConv2d)
        if of_1x1 and strided and module.in_channels < 16 and plain:
            module.__class__ = _with(_Subsampled, type(module))
        elif bfloat16 and module.groups > 1 and not scales:
            module.__class__ = _with(_InFloat32, type(module))


class _Subsampled(nn.Module):
    """Put before a conv class in the order of bases, takes every n-th pixel before a 1x1 conv."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        top, left = self.padding
        x = F.pad(x, (left, left, top, top))[..., :: self.stride[0], :: self.stride[1]]
        return F.conv2d(x, weight, bias, groups=self.groups)


class _InFloat32(nn.Module):
    """Put before a layer class in the order of bases, runs that layer outside autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


@cache
def _with(change: type[nn.Module], layer: type[nn.Module]) -> type[nn.Module]:
    return type(layer.__name__, (change, layer), {})
