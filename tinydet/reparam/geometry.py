"""The shape of the convolution or linear layer that is equivalent to a linear subgraph."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NotAConvolutionError(ValueError):
    """A module is not equivalent to a convolution; the message says why."""


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution over n spatial axes; n = 0 stands for a linear layer.

    Attributes:
        in_channels: channels of the input.
        out_channels: channels of the output.
        bias: whether the response to zeros is not zero.
        groups: as in `nn.Conv2d`.
        kernel_size: taps along each axis.
        stride: input steps per output step, along each axis.
        padding: zeros before and after each axis.
        dilation: distance of neighboring taps along each axis.
    """

    in_channels: int
    out_channels: int
    bias: bool
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    def build(self) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """Return a layer of this shape in float64 with uninitialized weights."""
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return nn.utils.skip_init(
            _KINDS[len(self.kernel_size)],
            self.in_channels,
            self.out_channels,
            *(shape if self.kernel_size else ()),
            bias=self.bias,
            dtype=torch.float64,
        )

    def multiply_adds(self, positions: int) -> int:
        """Return the multiply-adds for a number of output positions."""
        taps = math.prod(self.kernel_size) * self.in_channels // self.groups
        return positions * self.out_channels * taps

    def __str__(self) -> str:
        if not self.kernel_size:
            return f"linear {self.in_channels} -> {self.out_channels}"
        kernel = "x".join(str(k) for k in self.kernel_size)
        more = [f"stride {max(self.stride)}"] if max(self.stride) > 1 else []
        more += [f"dilation {max(self.dilation)}"] if max(self.dilation) > 1 else []
        more += [f"{self.groups} groups"] if self.groups > 1 else []
        return ", ".join([f"conv {kernel} {self.in_channels} -> {self.out_channels}", *more])


def as_geometry(
    offsets: list[list[int]], stride: tuple[int, ...], c_in: int, c_out: int, bias: bool
) -> Geometry:
    """Return the smallest kernel that has the given taps.

    Args:
        offsets: the positions that output 0 reads, in order, along each axis.
        stride: input steps per output step, along each axis.
        c_in: channels of the input.
        c_out: channels of the output.
        bias: whether the layer has a bias.

    Raises:
        NotAConvolutionError: the kernel does not begin at or before the first input.
    """
    if not all(offsets) or any(t[0] > 0 for t in offsets):
        raise NotAConvolutionError("its output does not lie over its input as a convolution's")
    dilation = tuple(math.gcd(*(b - a for a, b in itertools.pairwise(t))) or 1 for t in offsets)
    return Geometry(
        in_channels=c_in,
        out_channels=c_out,
        bias=bias,
        kernel_size=tuple((t[-1] - t[0]) // d + 1 for t, d in zip(offsets, dilation, strict=True)),
        stride=stride,
        padding=tuple(-t[0] for t in offsets),
        dilation=dilation,
    )
