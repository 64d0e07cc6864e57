"""A scale and a shift of each element of a tensor, carried past views, copies and pools."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinydet.reparam.dataflow import Op, View

# Each channel alone, and linear.
POOLS = {
    f"aten.{name}"
    for name in ("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "mean",
                 "upsample_nearest2d", "upsample_bilinear2d")
}  # fmt: skip


class NotMovableError(Exception):
    """Carries the reason for which a norm or a factor stays where it is."""


@dataclass(frozen=True)
class ChannelMap:
    """y = scale * x + shift.

    Attributes:
        scale: as many axes as the tensor, each of its length or 1.
        shift: likewise; None where it is zero whatever the weights are.
        generic: random numbers in the shape of the scale. They decide what varies along which
            axis: the scale of a fresh network is 1 everywhere, and must not decide otherwise than
            that of a trained one.
    """

    scale: Tensor
    shift: Tensor | None
    generic: Tensor

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor | None = None) -> ChannelMap:
        """Return a map that varies along each axis along which its tensors have a length."""
        generator = torch.Generator().manual_seed(0)
        return cls(scale, shift, torch.rand(scale.shape, generator=generator))

    def changed(self, change: Callable[[Tensor], Tensor]) -> ChannelMap:
        """Return the map with a change of layout made to all of its tensors."""
        shift = None if self.shift is None else change(self.shift)
        return ChannelMap(change(self.scale), shift, change(self.generic))

    def seen_as(self, here: View, there: View) -> ChannelMap:
        """Return the map for another view of the same memory.

        Raises:
            NotMovableError: the map does not say what happens to all of that view.
        """
        if (here.shape, here.stride, here.offset) == (there.shape, there.stride, there.offset):
            return self
        known, wanted = _places(here), _places(there)
        size = int(max(known.max(), wanted.max())) + 1
        if known.unique().numel() != known.numel():
            raise NotMovableError("its input is repeated in memory")
        filled = torch.zeros(size, dtype=torch.bool)
        filled[known] = True
        if not filled[wanted].all():
            raise NotMovableError("it sees only a part of its input's channels or places")

        def carried(values: Tensor) -> Tensor:
            memory = torch.zeros(size, dtype=values.dtype)
            memory[known] = values.expand(here.shape)
            return memory[wanted]

        return self.changed(carried)

    def along(self, axis: int) -> ChannelMap:
        """Return the map as one number for each index of an axis: tensors (C,).

        Raises:
            NotMovableError: it varies along another axis.
        """
        others = [a for a in range(self.scale.ndim) if a != axis % self.scale.ndim]
        return self.uniform(others).changed(Tensor.flatten)

    def uniform(self, axes: list[int]) -> ChannelMap:
        """Return the map with length 1 along some axes.

        Raises:
            NotMovableError: it varies along one of them.
        """
        mapping = self
        for axis in axes:
            first = mapping.generic.narrow(axis, 0, 1)
            if not torch.equal(first.expand_as(mapping.generic), mapping.generic):
                raise NotMovableError("its channels are not the channels of the layer before")
            mapping = mapping.changed(lambda values, axis=axis: values.narrow(axis, 0, 1))
        return mapping

    def past_pool(self, op: Op, forward: bool) -> ChannelMap:
        """Return the map on the other side of a pooling operation (`POOLS`).

        Args:
            op: the operation.
            forward: the map is of the operation's input, not of its output.

        Raises:
            NotMovableError: it varies between places, or has a shift that the zeros counted at
                the borders would change.
        """
        inside = op.inputs[0]
        if self.shift is not None:
            ones = torch.ones(inside.shape, dtype=self.scale.dtype)
            answer = op.func(ones, *op.args[1:], **op.kwargs)
            if not torch.allclose(answer, torch.ones_like(answer)):
                raise NotMovableError(f"{op.name} counts zeros at the borders")
        if op.name != "aten.mean":
            return self.uniform(list(range(2, self.scale.ndim)))
        axes = [a % len(inside.shape) for a in op.args[1] or range(len(inside.shape))]
        keeps = len(inside.shape) == len(op.outputs[0].shape)
        if forward:
            mapping = self.uniform(axes)
            kept = [n for a, n in enumerate(mapping.scale.shape) if a not in axes]
            return mapping if keeps else mapping.changed(lambda values: values.reshape(kept))
        full = [1 if a in axes else None for a in range(len(inside.shape))]
        lengths = iter(self.scale.shape)
        shape = [next(lengths) if n is None else n for n in full]
        return self if keeps else self.changed(lambda values: values.reshape(shape))


def _places(view: View) -> Tensor:
    """Return where in memory each element of a view lies."""
    reach = view.offset + sum(s * (n - 1) for s, n in zip(view.stride, view.shape, strict=True))
    if math.prod(view.shape) == 0:
        raise NotMovableError("it is empty")
    return torch.arange(reach + 1).as_strided(view.shape, view.stride, view.offset)
