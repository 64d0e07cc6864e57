"""A value as a convolution of another one, and its composition with convolutions, sums and pads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinydet.reparam.equivalent_layer import NO_TAP
from tinydet.reparam.geometry import Geometry

_CONV_TRANSPOSE = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
Numbers = Sequence[int]


class NotSupportedError(ValueError):
    """There is no rule for an operation; the message names it."""


@dataclass(frozen=True)
class Kernel:
    """A value as a convolution of a source; without spatial axes, as a linear layer.

    Along each axis, tap t of output o reads the source at stride * o + first + spacing * t, and
    reads zeros outside of it.

    Attributes:
        weight: (C_out, C_in / groups, *taps).
        bias: (C_out,).
        groups: as in `nn.Conv2d`.
        first: the position that the first tap of output 0 reads, along each axis.
        spacing: distance of neighboring taps along each axis, 0 where there is one tap.
        stride: steps of the source per output step, along each axis.
        slack: n steps of the source give (n + slack) // stride + 1 outputs, along each axis.
        flaw: why the value is not this convolution near its borders; empty if it is.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    first: tuple[int, ...]
    spacing: tuple[int, ...]
    stride: tuple[int, ...]
    slack: tuple[int, ...]
    flaw: str = ""

    @classmethod
    def of_source(cls, weight: Tensor, groups: int, axes: int) -> Kernel:
        """Return a kernel of one tap without bias from its (C_out, C_in / groups) weight."""
        weight = weight.view(*weight.shape, *[1] * axes)
        zero, one = (0,) * axes, (1,) * axes
        return cls(weight, weight.new_zeros(len(weight)), groups, zero, zero, one, (-1,) * axes)

    @property
    def taps(self) -> tuple[int, ...]:
        """The number of taps along each axis."""
        return tuple(self.weight.shape[2:])

    @property
    def last(self) -> tuple[int, ...]:
        """The position that the last tap of output 0 reads, along each axis."""
        axes = zip(self.first, self.spacing, self.taps, strict=True)
        return tuple(first + d * (k - 1) for first, d, k in axes)

    def scaled(self, scale: Tensor | float, shift: Tensor | float = 0.0) -> Kernel:
        """Multiply the output by a scale and add a shift, both of one channel or of C_out."""
        scale = torch.as_tensor(scale, dtype=self.weight.dtype).view(-1)
        weight = self.weight * scale.view(-1, *[1] * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=self.bias * scale + shift)

    def padded(self, before: Numbers, after: Numbers) -> Kernel:
        """Surround the output with zeros, or crop it by negative numbers."""
        flaw = self.flaw
        if any(p > 0 for p in (*before, *after)) and self.bias.abs().max() > NO_TAP:
            flaw = "it pads a shifted value with zeros"
        axes = zip(before, after, self.first, self.last, self.stride, self.slack, strict=True)
        for b, a, first, last, stride, slack in axes:
            # Outputs just outside must read only outside of the source, to be zero themselves.
            if (b > 0 and last >= stride) or (a > 0 and first + slack + 1 < 0):
                flaw = "it pads, with zeros, a value that is not zero further out"
        axes = zip(before, after, self.first, self.last, self.stride, self.slack, strict=True)
        moved = [(first - s * b, slack + s * (b + a)) for b, a, first, _, s, slack in axes]
        return replace(
            self, first=tuple(f for f, _ in moved), slack=tuple(e for _, e in moved), flaw=flaw
        )

    def strided(self, stride: Numbers) -> Kernel:
        """Keep every n-th output along each axis."""
        return replace(self, stride=tuple(map(math.prod, zip(self.stride, stride, strict=True))))

    def convolved(self, weight: Tensor, groups: int, dilation: Numbers) -> Kernel:
        """Convolve the output, without padding and with stride 1.

        Args:
            weight: (D, C_out / groups, *kernel).
            groups: as in `nn.Conv2d`.
            dilation: distance of the kernel's taps along each axis, in output steps.
        """
        kernel = tuple(weight.shape[2:])
        axes = zip(self.stride, dilation, kernel, strict=True)
        steps = tuple(s * d if k > 1 else 0 for s, d, k in axes)
        spacing = tuple(map(math.gcd, self.spacing, steps))
        sums = weight.flatten(2).sum(2) if kernel else weight
        bias = sums.view(groups, -1, weight.shape[1]) @ self.bias.view(groups, -1, 1)
        axes = zip(self.slack, steps, kernel, strict=True)
        grouped = weight.view(groups, -1, *weight.shape[1:])
        return replace(
            self._composed(grouped, _multiples(self.spacing, spacing), _multiples(steps, spacing)),
            bias=bias.flatten(),
            spacing=spacing,
            slack=tuple(slack - d * (k - 1) for slack, d, k in axes),
        )

    def _composed(self, outer: Tensor, own_steps: Numbers, steps: Numbers) -> Kernel:
        """Return the kernel after one of shape (G, D / G, C / G, *kernel); both dilated."""
        groups, _, columns, *kernel = outer.shape
        if self.groups == len(self.weight) and self.weight.shape[1] == 1:
            # Each channel comes from one of the source: no need for a dense kernel.
            if math.prod(self.taps) == 1 and bool((self.weight == 1).all()):
                weight = outer  # The source itself, most often.
            elif all(1 in sizes for sizes in zip(self.taps, kernel, strict=True)):
                weight = outer * self.weight.view(groups, 1, columns, *self.taps)
            else:
                images, kernels = self.weight.transpose(0, 1), outer.transpose(1, 2).flatten(0, 1)
                full = _full_convolution(images, kernels, own_steps, steps, self.groups)
                weight = full.view(groups, columns, -1, *full.shape[2:]).transpose(1, 2)
            return replace(self, weight=weight.flatten(0, 1), groups=groups)
        inner = self.with_groups(math.gcd(self.groups, groups))
        images = inner.weight.transpose(0, 1)  # (C_in / g, C, *taps)
        if math.prod(kernel) == 1 or math.prod(inner.taps) == 1:
            left = outer.movedim(2, -1).reshape(groups, -1, columns)
            right = images.reshape(len(images), groups, columns, -1).permute(1, 2, 0, 3)
            product = left @ right.flatten(2)  # (G, D / G * kernel, C_in / g * taps)
            product = product.view(-1, math.prod(kernel), len(images), math.prod(inner.taps))
            taps = map(max, inner.taps, kernel)
            weight = product.transpose(1, 2).reshape(len(product), len(images), *taps)
        else:
            kernels = outer.transpose(1, 2).flatten(0, 1)
            weight = _full_convolution(images, kernels, own_steps, steps, groups).transpose(0, 1)
        return replace(inner, weight=weight)

    def channels(self, start: int, stop: int, step: int = 1) -> Kernel:
        """Keep some of the output channels."""
        dense = self.with_groups(1)
        kept = slice(start, stop, step)
        return replace(dense, weight=dense.weight[kept], bias=dense.bias[kept])

    def with_groups(self, groups: int) -> Kernel:
        """Return the same convolution with fewer groups, each of several of its groups."""
        if groups == self.groups:
            return self
        columns = self.weight.shape[1] * self.groups // groups
        weight = self.weight.new_zeros(len(self.weight), columns, *self.taps)
        self._add_to(weight, groups, self.first, self.spacing)
        return replace(self, weight=weight, groups=groups)

    def _add_to(self, weight: Tensor, groups: int, first: Numbers, spacing: Numbers) -> None:
        """Add the kernel to another one with fewer groups and more taps."""
        axes = zip(self.first, first, self.spacing, spacing, self.taps, strict=True)
        at: tuple[Any, ...] = tuple(
            _taps((mine - other) // (u or 1), d // (u or 1), k) for mine, other, d, u, k in axes
        )
        blocks = _diagonal_blocks(weight, groups, self.groups // groups)
        own = self.weight.view(groups, -1, len(self.weight) // self.groups, *self.weight.shape[1:])
        blocks[(..., *at, slice(None))] += own.movedim(1, -1)

    def as_layer_weight(self, geometry: Geometry) -> Tensor:
        """Return the weight of a layer of a geometry that covers all taps that are not zero."""
        axes = zip(
            self.first,
            self.spacing,
            geometry.padding,
            geometry.dilation,
            geometry.kernel_size,
            strict=True,
        )
        at = tuple(_taps((-p - f) // (u or 1), d // (u or 1), k) for f, u, p, d, k in axes)
        fewer = self.with_groups(math.gcd(self.groups, geometry.groups))
        each = geometry.groups // fewer.groups
        blocks = _diagonal_blocks(fewer.weight, fewer.groups, each).movedim(-1, 1)
        where: tuple[Any, ...] = (..., *at)
        return blocks[where].flatten(0, 2)


def added(kernels: Sequence[Kernel]) -> Kernel:
    """Return the sum of several kernels of one output size."""
    groups = math.gcd(*(kernel.groups for kernel in kernels))
    like = kernels[0]
    columns = like.weight.shape[1] * like.groups // groups
    joined = _empty_like(kernels, len(like.weight), columns)
    for kernel in kernels:
        kernel._add_to(joined.weight, groups, joined.first, joined.spacing)
    return replace(joined, bias=torch.stack([k.bias for k in kernels]).sum(0), groups=groups)


def concatenated(kernels: Sequence[Kernel]) -> Kernel:
    """Return the concatenation, over channels, of several kernels of one output size."""
    like = kernels[0]
    bias = torch.cat([kernel.bias for kernel in kernels])
    joined = _empty_like(kernels, len(bias), like.weight.shape[1] * like.groups)
    parts = joined.weight.split([len(kernel.weight) for kernel in kernels])
    for kernel, part in zip(kernels, parts, strict=True):
        kernel._add_to(part, 1, joined.first, joined.spacing)
    return replace(joined, bias=bias, groups=1)


def _empty_like(kernels: Sequence[Kernel], rows: int, columns: int) -> Kernel:
    """Return a kernel of zeros whose taps include those of all kernels."""
    like = kernels[0]
    if any((k.stride, k.slack) != (like.stride, like.slack) for k in kernels):
        raise NotSupportedError("branches whose sizes agree for some inputs only")
    first = tuple(map(min, zip(*(k.first for k in kernels), strict=True)))
    last = tuple(map(max, zip(*(k.last for k in kernels), strict=True)))
    spacing = [0] * len(first)
    for kernel in kernels:
        shifts = (a - b for a, b in zip(kernel.first, first, strict=True))
        spacing = list(map(math.gcd, spacing, kernel.spacing, shifts))
    taps = [(b - a) // (u or 1) + 1 for a, b, u in zip(first, last, spacing, strict=True)]
    return replace(
        like,
        weight=like.weight.new_zeros(rows, columns, *taps),
        first=first,
        spacing=tuple(spacing),
        flaw=next((k.flaw for k in kernels if k.flaw), ""),
    )


def _diagonal_blocks(weight: Tensor, groups: int, each: int) -> Tensor:
    """Return the diagonal blocks of (O, I / G, *taps) as a view (G, O / g, I / g, *taps, each)."""
    rows, columns, *taps = weight.shape
    shape = (groups, each, rows // (groups * each), each, columns // each, *taps)
    return weight.view(shape).diagonal(dim1=1, dim2=3)


def _taps(start: int, step: int, count: int) -> slice:
    return slice(start, start + max(step, 1) * (count - 1) + 1, max(step, 1))


def _multiples(distances: Numbers, unit: Numbers) -> list[int]:
    return [d // (u or 1) or 1 for d, u in zip(distances, unit, strict=True)]


def _full_convolution(
    images: Tensor, kernels: Tensor, spread: Numbers, dilation: Numbers, groups: int
) -> Tensor:
    """Return every overlap of (B, C, *taps) with (C, D / groups, *kernel), as (B, D, *taps)."""
    axes = images.ndim - 2
    return _CONV_TRANSPOSE[axes](  # type: ignore[misc]
        images, kernels, stride=spread, dilation=dilation, groups=groups
    )
