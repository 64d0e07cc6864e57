"""A scale and a shift of each element of a tensor, moved across views and copies of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinydet.reparam.dataflow import View

_IDENTITY = 1.0  # No random number is exactly one.


class NotFusableError(Exception):
    """A norm or a factor cannot be fused; the message is the reason."""


class OtherAxisError(NotFusableError):
    """It varies along another axis than the channels of the layer."""


@dataclass(frozen=True)
class ChannelAffine:
    """y = scale * x + shift.

    Attributes:
        scale: as many axes as the tensor, each of its length or 1.
        shift: in the same shape; None where it is zero whatever the weights are.
        generic: random numbers in the same shape. They decide along which axes the map varies, so
            that an untrained network, whose scale is 1 everywhere, folds into the same structure as
            a trained one. Exactly 1 where the map must be the identity, because something else
            reads these elements; NaN where it is free, because nothing reads them.
    """

    scale: Tensor
    shift: Tensor | None
    generic: Tensor

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor | None = None) -> ChannelAffine:
        """Return a map that varies along each axis on which its tensors are longer than 1."""
        return cls(scale, shift, generic_numbers(scale.shape))

    @classmethod
    def identity(cls, like: ChannelAffine, shape: Sequence[int]) -> ChannelAffine:
        """Return the identity on a tensor; it has a shift if another map has one."""
        shift = None if like.shift is None else like.shift.new_zeros(shape)
        ones = like.scale.new_ones(shape)
        return cls(ones, shift, torch.full_like(ones, _IDENTITY))

    @property
    def known(self) -> Tensor:
        """Where the map is not free."""
        return ~self.generic.isnan()

    def changed(self, change: Callable[[Tensor], Tensor]) -> ChannelAffine:
        """Return the map with a layout change applied to all of its tensors."""
        shift = None if self.shift is None else change(self.shift)
        return ChannelAffine(change(self.scale), shift, change(self.generic))

    def expand(self, shape: Sequence[int]) -> ChannelAffine:
        """Return the map with its tensors expanded to the shape of the tensor it applies to."""
        return self.changed(lambda values: values.expand(tuple(shape)))

    def scattered(self, at: Tensor, size: int) -> ChannelAffine:
        """Return a map over `size` elements in a row, which is free where no index points.

        Args:
            at: for each element of this map, in its full shape, its index in the result; -1 for
                none.
            size: the result has one free element more.

        Raises:
            NotFusableError: elements with different maps have the same index.
        """
        wanted = self.known & (at >= 0)
        at = at[wanted]

        def placed(values: Tensor, rest: float) -> Tensor:
            row = torch.full((size + 1,), rest, dtype=values.dtype)
            row[at] = values[wanted]
            return row

        generic = placed(self.generic, math.nan)
        if not torch.equal(generic[at], self.generic[wanted]):
            raise NotFusableError("different channels of its input are copies of one")
        shift = None if self.shift is None else placed(self.shift, 0.0)
        return ChannelAffine(placed(self.scale, 1.0), shift, generic)

    def for_view(self, here: View, there: View, forward: bool) -> ChannelAffine:
        """Return the map for another view of the same memory.

        Args:
            here: the tensor this map applies to.
            there: another view of that memory.
            forward: `there` is read after the map was applied to `here`. Otherwise it is written
                before, and free where `here` does not look.

        Raises:
            NotFusableError: the map does not cover all that is read, or covers more than was
                written.
        """
        if same_layout(here, there):
            return self
        size = 1 + max(last_position(here), last_position(there))
        known, wanted = positions(here), positions(there)
        memory = self.expand(here.shape).scattered(known, size)
        seen = torch.zeros(size + 1, dtype=torch.bool)
        if forward:
            seen[known] = True
            if not seen[wanted].all():
                raise NotFusableError("what reads its output also reads other values beside it")
        else:
            seen[wanted] = True
            if (memory.known & ~seen).any():
                raise NotFusableError("parts of its input come from different operations")
        return memory.changed(lambda values: values[wanted])

    def apart_from(self, here: View, other: View, reason: str) -> ChannelAffine:
        """Return the map that is the identity on the elements of another view of the memory.

        Raises:
            NotFusableError: they overlap, for the given reason.
        """
        affine = self.expand(here.shape)
        read = torch.zeros(1 + max(last_position(here), last_position(other)), dtype=torch.bool)
        read[positions(other)] = True
        beside = read[positions(here)]
        if (beside & affine.known & (affine.generic != _IDENTITY)).any():
            raise NotFusableError(reason)
        generic = torch.where(beside, _IDENTITY, affine.generic)
        return ChannelAffine(affine.scale, affine.shift, generic)

    def beside(self, other: ChannelAffine, reason: str) -> ChannelAffine:
        """Return both maps in one, where each is the identity on the other's elements.

        Raises:
            NotFusableError: they overlap, for the given reason.
        """
        if not ((self.generic == _IDENTITY) | (other.generic == _IDENTITY)).all():
            raise NotFusableError(reason)
        shifts = [s for s in (self.shift, other.shift) if s is not None]
        return ChannelAffine(
            self.scale * other.scale,
            torch.stack(shifts).sum(0) if shifts else None,
            self.generic * other.generic,
        )

    def along(self, axis: int) -> ChannelAffine:
        """Return the map as (C,) tensors over one axis, and as the identity where it is free.

        Raises:
            NotFusableError: it varies along another axis.
        """
        others = [a for a in range(self.scale.ndim) if a != axis % self.scale.ndim]
        row = self.uniform(others).changed(Tensor.flatten)
        return ChannelAffine(row.scale, row.shift, row.generic.nan_to_num(_IDENTITY))

    def uniform(self, axes: list[int]) -> ChannelAffine:
        """Return the map reduced to length 1 along some axes.

        Raises:
            NotFusableError: it varies along one of them.
        """
        shape = self.generic.shape
        long = [a for a in axes if shape[a] > 1]
        if not long:
            return self
        rest = [a for a in range(len(shape)) if a not in long]
        kept = [1 if a in long else n for a, n in enumerate(shape)]

        def rows(values: Tensor) -> Tensor:
            return values.permute(*rest, *long).flatten(len(rest))

        generic = rows(self.generic)
        first = (~generic.isnan()).int().argmax(-1, keepdim=True)
        differs = (generic != generic.gather(-1, first)) & ~generic.isnan()
        if differs.any():
            if (generic == _IDENTITY).any():
                raise NotFusableError("other places of the same channels are used elsewhere")
            raise OtherAxisError("its channels are not the channels of the layer before")
        return self.changed(lambda values: rows(values).gather(-1, first).reshape(kept))


def concatenated(maps: Sequence[ChannelAffine], axis: int) -> ChannelAffine:
    """Return the map of a concatenation, given those of its parts in their full shapes."""
    shifts = [a.shift for a in maps if a.shift is not None]
    return ChannelAffine(
        torch.cat([a.scale for a in maps], axis),
        torch.cat(shifts, axis) if shifts else None,
        torch.cat([a.generic for a in maps], axis),
    )


def generic_numbers(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return random numbers from 0 to 1, always the same for a shape and a seed."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def same_layout(a: View, b: View) -> bool:
    """Return whether two views of one memory see the same elements in the same order."""
    return (a.shape, a.stride, a.offset) == (b.shape, b.stride, b.offset)


def last_position(view: View) -> int:
    """Return the largest position in memory of an element of a view."""
    return view.offset + sum(s * (n - 1) for s, n in zip(view.stride, view.shape, strict=True))


def positions(view: View) -> Tensor:
    """Return the position in memory of each element of a view."""
    return torch.arange(last_position(view) + 1).as_strided(view.shape, view.stride, view.offset)
