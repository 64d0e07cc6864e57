"""A scale and a shift of each element of a tensor, moved across views, copies and pools."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tinydet.reparam.dataflow import Op, View

# Linear, and each channel on its own.
POOLS = {
    f"aten.{name}"
    for name in ("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "mean",
                 "upsample_nearest2d", "upsample_bilinear2d")
}  # fmt: skip


class NotFusableError(Exception):
    """A norm or a factor cannot be fused; the message is the reason."""


@dataclass(frozen=True)
class ChannelAffine:
    """y = scale * x + shift.

    Attributes:
        scale: as many axes as the tensor, each of its length or 1.
        shift: likewise; None where it is zero whatever the weights are.
        generic: random numbers in the shape of the scale. They decide along which axes the map
            varies, so that an untrained network, whose scale is 1 everywhere, folds into the same
            structure as a trained one.
    """

    scale: Tensor
    shift: Tensor | None
    generic: Tensor

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor | None = None) -> ChannelAffine:
        """Return a map that varies along each axis on which its tensors are longer than 1."""
        generator = torch.Generator().manual_seed(0)
        return cls(scale, shift, torch.rand(scale.shape, generator=generator))

    def changed(self, change: Callable[[Tensor], Tensor]) -> ChannelAffine:
        """Return the map with a layout change applied to all of its tensors."""
        shift = None if self.shift is None else change(self.shift)
        return ChannelAffine(change(self.scale), shift, change(self.generic))

    def for_view(self, here: View, there: View) -> ChannelAffine:
        """Return the map for another view of the same memory.

        Raises:
            NotFusableError: the map does not cover all of that view.
        """
        if (here.shape, here.stride, here.offset) == (there.shape, there.stride, there.offset):
            return self
        known, wanted = _positions(here), _positions(there)
        size = int(max(known.max(), wanted.max())) + 1
        if known.unique().numel() != known.numel():
            raise NotFusableError("its input is repeated in memory")
        filled = torch.zeros(size, dtype=torch.bool)
        filled[known] = True
        if not filled[wanted].all():
            raise NotFusableError("it sees only a part of its input's channels or places")

        def through_memory(values: Tensor) -> Tensor:
            memory = torch.zeros(size, dtype=values.dtype)
            memory[known] = values.expand(here.shape)
            return memory[wanted]

        return self.changed(through_memory)

    def along(self, axis: int) -> ChannelAffine:
        """Return the map as (C,) tensors over one axis.

        Raises:
            NotFusableError: it varies along another axis.
        """
        others = [a for a in range(self.scale.ndim) if a != axis % self.scale.ndim]
        return self.uniform(others).changed(Tensor.flatten)

    def uniform(self, axes: list[int]) -> ChannelAffine:
        """Return the map reduced to length 1 along some axes.

        Raises:
            NotFusableError: it varies along one of them.
        """
        affine = self
        for axis in axes:
            first = affine.generic.narrow(axis, 0, 1)
            if not torch.equal(first.expand_as(affine.generic), affine.generic):
                raise NotFusableError("its channels are not the channels of the layer before")
            affine = affine.changed(partial(torch.narrow, dim=axis, start=0, length=1))
        return affine

    def through_pool(self, op: Op, forward: bool) -> ChannelAffine:
        """Return the map on the other side of a pooling operation (`POOLS`).

        Args:
            op: the operation.
            forward: the map is of the operation's input, not of its output.

        Raises:
            NotFusableError: it varies between positions, or it has a shift and the pool averages
                over padded zeros.
        """
        inside = op.inputs[0]
        if self.shift is not None:
            ones = torch.ones(inside.shape, dtype=self.scale.dtype)
            pooled = op.func(ones, *op.args[1:], **op.kwargs)
            if not torch.allclose(pooled, torch.ones_like(pooled)):
                raise NotFusableError(f"{op.name} counts zeros at the borders")
        if op.name != "aten.mean":
            return self.uniform(list(range(2, self.scale.ndim)))
        axes = [a % len(inside.shape) for a in op.args[1] or range(len(inside.shape))]
        keeps = len(inside.shape) == len(op.outputs[0].shape)
        if forward:
            affine = self.uniform(axes)
            kept = [n for a, n in enumerate(affine.scale.shape) if a not in axes]
            return affine if keeps else affine.changed(lambda values: values.reshape(kept))
        full = [1 if a in axes else None for a in range(len(inside.shape))]
        lengths = iter(self.scale.shape)
        shape = [next(lengths) if n is None else n for n in full]
        return self if keeps else self.changed(lambda values: values.reshape(shape))


def _positions(view: View) -> Tensor:
    """Return the position in memory of each element of a view."""
    last = view.offset + sum(s * (n - 1) for s, n in zip(view.stride, view.shape, strict=True))
    if math.prod(view.shape) == 0:
        raise NotFusableError("it is empty")
    return torch.arange(last + 1).as_strided(view.shape, view.stride, view.offset)
