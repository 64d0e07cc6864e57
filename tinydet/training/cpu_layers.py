"""Convolutions that a CPU has to compute in another way: the same function, names and weights."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prepare_for_cpu(model: nn.Module, bfloat16: bool) -> None:
    """Give convolutions a class that trains well on a CPU; the network stays the same function.

    Strided 1x1 convolutions of few channels take every n-th pixel first: oneDNN writes past its
    workspace in their backward pass and kills the process (github.com/uxlfoundation/oneDNN, number
    6035; to be removed once torch ships the fix). In bfloat16 depthwise convolutions stay in
    float32: the backward pass of a depthwise convolution is several times slower in bfloat16.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        strided_1x1 = module.kernel_size == (1, 1) and max(module.stride) > 1
        if strided_1x1 and module.in_channels < 16 and type(module) is nn.Conv2d:
            module.__class__ = _Subsampled
        elif bfloat16 and module.groups > 1:
            module.__class__ = _in_float32(type(module))


class _Subsampled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        top, left = self.padding
        x = F.pad(x, (left, left, top, top))[..., :: self.stride[0], :: self.stride[1]]
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


class _InFloat32(nn.Module):
    """Put before a layer class in the order of bases, runs that layer outside autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


@cache
def _in_float32(layer: type[nn.Module]) -> type[nn.Module]:
    return type(layer.__name__, (_InFloat32, layer), {})
