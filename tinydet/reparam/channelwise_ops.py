"""Operations that a scale and a shift of each channel can be moved across.

    op(scale * x + shift) = scale' * op(x) + shift'

Whether that holds at every input size is derived from the arguments of the operation, not from the
sizes that were observed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinydet.reparam.channel_affine import (
    ChannelAffine,
    NotFusableError,
    generic_numbers,
    last_position,
    positions,
)
from tinydet.reparam.dataflow import SIZE_ONLY, DataFlow, Op, View, storage_of
from tinydet.reparam.module_swap import hooks_disabled

# Each output element is a weighted mean of one channel's places, along the last axes.
PLACES = {
    f"aten.{name}{axes}d": axes
    for axes, names in {
        1: ("reflection_pad", "replication_pad", "upsample_nearest", "_upsample_nearest_exact",
            "upsample_linear"),
        2: ("avg_pool", "_adaptive_avg_pool", "reflection_pad", "replication_pad",
            "upsample_nearest", "_upsample_nearest_exact", "upsample_bilinear", "upsample_bicubic"),
        3: ("avg_pool", "_adaptive_avg_pool", "reflection_pad", "replication_pad",
            "upsample_nearest", "_upsample_nearest_exact", "upsample_trilinear"),
    }.items()
    for name in names
}  # fmt: skip
# Each output element is an input element.
REARRANGEMENTS = {
    f"aten.{name}"
    for name in ("flip", "roll", "index_select", "index", "repeat", "pixel_shuffle",
                 "pixel_unshuffle", "channel_shuffle", "constant_pad_nd")
}  # fmt: skip
COPIES = ("aten.clone", "aten._to_copy")
FACTORS = ("aten.mul", "aten.mul_", "aten.div", "aten.div_")
SUMS = ("aten.add", "aten.add_", "aten.sub", "aten.sub_")
_ELEMENTWISE = (*FACTORS, *SUMS, "aten.rsub", "aten.neg")


def moved_across(op: Op, seen: View, affine: ChannelAffine, forward: bool) -> ChannelAffine | None:
    """Return the scale and shift on the other side of an operation.

    Args:
        op: an operation of which one argument depends on the network's input.
        seen: that argument.
        affine: the scale and shift of that argument, or of the result.
        forward: they are of the argument; the result's are wanted.

    Returns:
        The scale and shift; None if nothing is known about operations of this kind.

    Raises:
        NotFusableError: this operation does not keep channels or their shifts apart.
    """
    if op.name in COPIES:
        dtype = op.kwargs.get("dtype")
        return affine if dtype is None or dtype.is_floating_point else None
    if op.name in _ELEMENTWISE:
        return _across_constant(op, seen, affine, forward)
    if op.inputs[0] != seen:
        return None
    if op.name in REARRANGEMENTS:
        return _across_rearrangement(op, seen, affine, forward)
    if op.name in PLACES:
        if affine.shift is not None:
            if op.name.startswith("aten.avg_pool") and not _averages_only_inputs(op):
                raise NotFusableError(f"{op.name} counts zeros at the borders")
            _check_at_other_sizes(op)
        return affine.uniform(list(range(len(seen.shape) - PLACES[op.name], len(seen.shape))))
    if op.name == "aten.mean":
        return _across_mean(op, seen, affine, forward)
    return None


def _averages_only_inputs(op: Op) -> bool:
    """Whether an average pool of ones is ones, at any size."""
    defaults: tuple[Any, ...] = ([], [0], False, True, None)
    given = (*op.args[2:], *defaults[len(op.args) - 2 :])
    _, padding, ceil_mode, counts_padding, divisor = given
    if divisor is None:
        return not counts_padding or not any(padding)
    # Windows that hang over the border have fewer elements.
    kernel: list[int] = op.args[1]
    taps = math.prod(kernel) ** (PLACES[op.name] // len(kernel))
    return divisor == taps and not ceil_mode and not any(padding)


def _check_at_other_sizes(op: Op) -> None:
    """Check that a module which pools does not pad with zeros at sizes next to the observed one.

    Raises:
        NotFusableError: what it returns for ones varies from place to place.
    """
    call = op.call
    if call is None or op.inputs[0] not in call.inputs or op.outputs[0] not in call.outputs:
        return
    for more in range(4):
        shape = (*op.inputs[0].shape[:2], *(n + more for n in op.inputs[0].shape[2:]))
        with hooks_disabled(call.module), torch.no_grad():
            try:
                places = call.module(torch.ones(shape, dtype=torch.float64)).flatten(2)
            except Exception:
                continue  # It takes no such size, and may raise anything.
        if not torch.allclose(places, places[..., :1]):
            raise NotFusableError(f"{call.name} counts zeros at the borders")


def _across_mean(op: Op, seen: View, affine: ChannelAffine, forward: bool) -> ChannelAffine:
    count = len(seen.shape)
    axes = [a % count for a in (op.args[1] if len(op.args) > 1 else None) or range(count)]
    keeps = count == len(op.outputs[0].shape)
    if forward:
        affine = affine.uniform(axes)
        kept = [n for a, n in enumerate(affine.scale.shape) if a not in axes]
        return affine if keeps else affine.changed(lambda values: values.reshape(kept))
    lengths = iter(affine.scale.shape)
    shape = [1 if a in axes else next(lengths) for a in range(count)] if not keeps else []
    return affine if keeps else affine.changed(lambda values: values.reshape(shape))


def _across_rearrangement(
    op: Op, seen: View, affine: ChannelAffine, forward: bool
) -> ChannelAffine:
    if op.name == "aten.constant_pad_nd":
        pads = op.args[1]
        crops = max(pads) <= 0 and min(pads) < 0
        if not crops:
            if len(op.args) > 2 and op.args[2] != 0:
                raise NotFusableError(f"{op.name} pads with the number {op.args[2]}")
            # Also if no side is padded at the observed size.
            if affine.shift is not None:
                raise NotFusableError(f"{op.name} pads with zeros: those would be shifted too")
    count = math.prod(seen.shape)
    # Numbered from 1: a padded place is a 0, and becomes -1.
    numbers = torch.arange(1.0, count + 1, dtype=torch.float64).view(seen.shape)
    source = op.func(numbers, *op.args[1:], **op.kwargs).long() - 1
    if forward:
        inside = affine.expand(seen.shape).scattered(torch.arange(count).view(seen.shape), count)
        return inside.changed(lambda values: values[source])
    inside = affine.expand(source.shape).scattered(source, count)
    return inside.changed(lambda values: values[:-1].view(seen.shape))


def _across_constant(
    op: Op, seen: View, affine: ChannelAffine, forward: bool
) -> ChannelAffine | None:
    """Move a map across factor * x + added, both constant."""
    tensors = [a for a in op.args if isinstance(a, Tensor)]
    place = next((i for i, a in enumerate(op.args) if _is_view_of(a, seen)), None)
    if place is None or op.outputs[0].shape != seen.shape or op.kwargs.get("rounding_mode"):
        return None
    if op.mutates and place != 0:
        return None
    if op.name in ("aten.div", "aten.div_") and place != 0:
        return None
    scales = op.name in FACTORS
    if scales and affine.shift is None:
        return affine
    constants = [a for a in tensors if not _is_view_of(a, seen)]
    shape = torch.broadcast_shapes((1,) * len(seen.shape), *(c.shape for c in constants))

    def at(value: float) -> Tensor:
        x = torch.full(shape, value, dtype=torch.float64)
        return op.func(*op.args[:place], x, *op.args[place + 1 :], **op.kwargs)

    added = at(0.0)
    factor = at(1.0) - added
    shift = torch.zeros_like(affine.scale) if affine.shift is None else affine.shift
    if forward:
        new_shift = factor * shift + added * (1 - affine.scale)
    elif scales and (constants or not factor.all()):
        raise NotFusableError(f"{op.name} in between multiplies by what may be zero")
    else:
        new_shift = (shift - added * (1 - affine.scale)) / factor
    # Another constant would make another map: where it has several numbers, they may differ.
    generic = affine.generic
    for constant in constants:
        generic = _varied(generic, constant.shape, storage_of(constant))
    whole = torch.broadcast_shapes(new_shift.shape, generic.shape)
    return ChannelAffine(affine.scale, new_shift, generic).expand(whole)


def _varied(generic: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    return torch.where(generic == 1, generic, generic * generic_numbers(shape, seed))


def _is_view_of(argument: object, view: View) -> bool:
    return isinstance(argument, Tensor) and storage_of(argument) == view.storage


def copies_into(flow: DataFlow, op: Op) -> list[Op]:
    """Return the copies that fill new memory, as circular padding does, up to its first other use.

    Args:
        flow: the observed forward pass.
        op: one of the copies; the result is empty if it is none.
    """
    if op.name != "aten.copy_":
        return []
    memory = op.outputs[0].storage
    found: list[Op] = []
    for user in flow.users(op.args[0]):
        if user.name != "aten.copy_" or user.outputs[0].storage != memory:
            break
        found.append(user)
    made = flow.producer((memory, 0))
    fresh = made is not None and (made.name in SIZE_ONLY or not made.inputs)
    sources = {view.value for o in found for view in o.inputs if view.storage != memory}
    return found if op in found and fresh and len(sources) == 1 else []


def memory_of(copies: list[Op]) -> View:
    """Return a view in one row of all the memory that copies fill."""
    size = 1 + max(last_position(copy.outputs[0]) for copy in copies)
    return View(copies[-1].outputs[0].value, (size,), (1,), 0)


def moved_across_copies(
    copies: list[Op], affine: ChannelAffine, here: View, forward: bool
) -> tuple[View, ChannelAffine]:
    """Return the memory on the other side of copies into new memory, and the map of it.

    Args:
        copies: the result of `copies_into`.
        affine: the scale and shift of their source, or of their result.
        here: the tensor they apply to.
        forward: they are of the source; the result's are wanted.

    Raises:
        NotFusableError: the copies leave a part of the memory as it was created.
    """
    result = memory_of(copies)
    (size,) = result.shape
    source = torch.full((size,), -1)
    read = []
    for copy in copies:
        there, given = copy.outputs[0], copy.inputs[-1]
        at = positions(given)
        if given.storage == result.storage:
            at = source[at]
        else:
            read.append(given)
        source[positions(there)] = at.expand(there.shape)
    if (source < 0).any():
        raise NotFusableError("its values are copied into a larger tensor")
    outside = 1 + max(last_position(view) for view in (*read, here))
    if forward:
        memory = affine.expand(here.shape).scattered(positions(here), outside)
        return result, memory.changed(lambda values: values[source])
    row = affine.expand(here.shape).scattered(source, outside)
    return View(read[0].value, (outside,), (1,), 0), row.changed(lambda values: values[:-1])
