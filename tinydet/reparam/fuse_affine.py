"""Fuse a scale and a shift into the layers that produce its input or read its output.

    s (W x + b) + t = (s W) x + (s b + t)          W (s x + t) + b = (W s) x + (W t + b)

These layers are found in the observed data flow, never by name or definition order. Views, copies,
sums, concatenations and pools in between are allowed, as they keep channels apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from tinydet.reparam.affine import is_product
from tinydet.reparam.channel_affine import ChannelAffine, NotFusableError, concatenated
from tinydet.reparam.channelwise_ops import (
    SUMS,
    copies_into,
    memory_of,
    moved_across,
    moved_across_copies,
)
from tinydet.reparam.dataflow import SIZE_ONLY, Call, DataFlow, Op, View, storage_of
from tinydet.reparam.module_swap import has_hooks

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Layer = (
    nn.Linear
    | nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
)
PADS = {
    "aten.constant_pad_nd",
    "aten.clone",
    *(f"aten.{kind}_pad{axes}d" for kind in ("reflection", "replication") for axes in (1, 2, 3)),
}


@dataclass(frozen=True)
class Fusion:
    """A layer and the scale and shift to be multiplied into its weights.

    Attributes:
        call: the call of the layer.
        affine: (C,) tensors, over the output channels, or over the input channels if `before`.
        before: the scale and shift are applied before the layer.
    """

    call: Call
    affine: ChannelAffine
    before: bool

    @property
    def layer(self) -> Layer:
        """The layer that is called."""
        return cast(Layer, self.call.module)

    def apply(self) -> None:
        """Change the layer's weight and bias in place."""
        layer, scale, shift = self.layer, self.affine.scale, self.affine.shift
        weight: Tensor = layer.weight
        bias: Tensor | None = layer.bias
        new_bias = bias
        if self.before:
            new_weight = weight * _over_inputs(layer, scale)
            if shift is not None:
                added = (weight * _over_inputs(layer, shift)).flatten(1).sum(1)
                new_bias = added if bias is None else bias + added
        else:
            new_weight = _scaled_rows(layer, scale)
            if bias is not None:
                new_bias = bias * scale
            if shift is not None:
                new_bias = shift if new_bias is None else new_bias + shift
        layer.weight = _parameter(new_weight, weight)
        if new_bias is not None:
            layer.bias = _parameter(new_bias, weight if bias is None else bias)


def apply_fusions(fusions: list[Fusion]) -> str:
    """Change the weights of all the layers, and name the layers."""
    for fusion in fusions:
        fusion.apply()
    return f"into {', '.join(fusion.call.name for fusion in fusions)}"


def producer_fusions(
    flow: DataFlow, view: View, readers: set[Op], affine: ChannelAffine
) -> list[Fusion]:
    """Return the fusions of a scale and shift into the layers that produce its input.

    Args:
        flow: the observed forward pass.
        view: the tensor the scale and shift are applied to, as its readers see it.
        readers: the operations that apply them; others may only read other channels.
        affine: the scale and shift.

    Raises:
        NotFusableError: part of that tensor does not come from a conv or linear layer, or is used
            elsewhere.
    """
    op = flow.producer(view.value)
    if op is None:
        given = view.value in {v.value for v in flow.inputs}
        raise NotFusableError(
            f"its input is {'an input of the network' if given else 'constant'}, "
            "not the output of a layer"
        )
    call = op.call
    is_output = call is not None and is_layer_call(call) and call.outputs[0].value == view.value
    copies = copies_into(flow, op)
    outputs = call.outputs if call is not None and is_output else op.outputs
    out = next(v for v in outputs if v.value == view.value)
    out = memory_of(copies) if copies else out
    affine = affine.for_view(view, out, forward=False)
    # What an operation in place leaves as it was, others may read beside `out`.
    whole = bool(copies) or not op.mutates
    affine = _apart_from_other_readers(flow, op, out, readers, affine, whole)
    if call is not None and is_output:
        axis = -1 if isinstance(call.module, nn.Linear) else 1
        return [Fusion(call, affine.along(axis), before=False)]
    if copies:
        source, affine = moved_across_copies(copies, affine, out, forward=False)
        return producer_fusions(flow, source, set(copies), affine)
    inputs = op.varying(flow.depends_on_input())
    if len(inputs) == 1:
        moved = moved_across(op, inputs[0], affine, forward=False)
        if moved is not None:
            return producer_fusions(flow, inputs[0], {op}, moved)
    if op.name in SUMS and len(op.inputs) == len(inputs) == 2 and not op.kwargs:
        first, second = inputs
        if first.shape == second.shape == out.shape and first.value != second.value:
            # Only one side takes the shift. A subtracted side takes the same scale.
            rest = replace(affine, shift=None)
            return [
                *producer_fusions(flow, first, {op}, affine),
                *producer_fusions(flow, second, {op}, rest),
            ]
    if op.name == "aten.cat" and len(inputs) == len(op.inputs) == len({v.value for v in inputs}):
        return _concatenation_fusions(flow, op, inputs, affine)
    if is_product(op):
        raise NotFusableError(
            f"its input comes from {_where(op)}, which does not just apply the weights of a layer"
        )
    raise NotFusableError(f"its input comes from {_where(op)}, not from a conv or linear layer")


def _apart_from_other_readers(
    flow: DataFlow, maker: Op, out: View, readers: set[Op], affine: ChannelAffine, whole: bool
) -> ChannelAffine:
    """Return the map that leaves alone what something else reads of an operation's output.

    Args:
        flow: the observed forward pass.
        maker: the operation.
        out: its output.
        readers: the operations that apply the map.
        affine: the map.
        whole: `out` is all of that memory.

    Raises:
        NotFusableError: something else reads the same elements, or changes some in place.
    """
    output = f"the output of {_where(maker)}"
    others = [(v, f"{output} is also an output of the network") for v in flow.outputs]
    for op in flow.readers(out.value):
        if op not in readers and op.name not in SIZE_ONLY:
            reason = f"{output} is also used by {_where(op)}"
            if op.mutates and op.outputs[0].storage == out.storage:
                raise NotFusableError(reason)
            others += [(view, reason) for view in op.inputs]
    for view, reason in others:
        if view.value == out.value:
            if not whole:
                raise NotFusableError(reason)
            affine = affine.apart_from(out, view, reason)
    return affine


def _concatenation_axis(op: Op) -> int:
    axis = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    return int(axis) % len(op.outputs[0].shape)


def _concatenation_fusions(
    flow: DataFlow, op: Op, inputs: list[View], affine: ChannelAffine
) -> list[Fusion]:
    axis = _concatenation_axis(op)
    found, start = [], 0
    for view in inputs:
        length = view.shape[axis]

        def part(values: Tensor, start: int = start, length: int = length) -> Tensor:
            return values if values.shape[axis] == 1 else values.narrow(axis, start, length)

        found += producer_fusions(flow, view, {op}, affine.changed(part))
        start += length
    return found


def consumer_fusions(flow: DataFlow, view: View, affine: ChannelAffine) -> list[Fusion]:
    """Return the fusions of a scale and shift into all layers that read its output.

    Args:
        flow: the observed forward pass.
        view: the tensor that the scale and shift produce.
        affine: the scale and shift.

    Raises:
        NotFusableError: some reader is no such layer.
    """
    if flow.is_returned(view.value):
        raise NotFusableError("its output is also an output of the network")
    found = []
    readers = [op for op in flow.readers(view.value) if op.name not in SIZE_ONLY]
    if not readers:
        raise NotFusableError("its output is not used")
    for op in readers:
        for number, seen in enumerate(op.inputs):
            if seen.value == view.value:
                there = affine.for_view(view, seen, forward=True)
                found += _reader_fusions(flow, op, number, there)
    return found


def _reader_fusions(flow: DataFlow, op: Op, number: int, affine: ChannelAffine) -> list[Fusion]:
    """Return the fusions of a scale and shift of one argument of an operation."""
    seen, call = op.inputs[number], op.call
    if (
        call is not None
        and is_layer_call(call)
        and call.inputs[0].value == seen.value
        and _reads_plainly(call)
    ):
        axis = -1 if isinstance(call.module, nn.Linear) else 1
        affine = affine.for_view(seen, call.inputs[0], forward=True).along(axis)
        if affine.shift is not None and (pads := _pads_with_zeros(call)):
            raise NotFusableError(
                f"{call.name}, which reads it, {pads}: those would be shifted too"
            )
        return [Fusion(call, affine, before=True)]
    if copies := copies_into(flow, op):
        if any(view.value == seen.value for o in copies[: copies.index(op)] for view in o.inputs):
            return []  # Moved with the first of them.
        result, moved = moved_across_copies(copies, affine, seen, forward=True)
        return consumer_fusions(flow, result, moved)
    if op.name == "aten.cat":
        axis = _concatenation_axis(op)
        parts = [
            affine.expand(view.shape) if n == number else ChannelAffine.identity(affine, view.shape)
            for n, view in enumerate(op.inputs)
        ]
        return consumer_fusions(flow, op.outputs[0], concatenated(parts, axis))
    if len(op.varying(flow.depends_on_input())) == 1:
        there = moved_across(op, seen, affine, forward=True)
        if there is not None:
            return consumer_fusions(flow, op.outputs[0], there)
    raise NotFusableError(f"its output is used by {_where(op)}")


def is_layer_call(call: Call) -> bool:
    """Whether a call computes exactly x -> W x + b with the module's own weight and bias.

    Decided by the operations that ran: subclasses with another padding qualify, those that modify
    the weight on the fly or process the output further do not.
    """
    module = call.module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(module, (*_CONVS, *_TRANSPOSED, nn.Linear)) or weight is None:
        return False
    if len(call.outputs) != 1 or len(call.inputs) != 1:
        return False
    products = [op for op in call.ops if is_product(op)]
    if len(products) != 1 or storage_of(weight) not in {v.storage for v in products[0].inputs}:
        return False
    if isinstance(module, (*_CONVS, *_TRANSPOSED)) and len(call.outputs[0].shape) != weight.ndim:
        return False  # No batch axis.
    later = call.ops[call.ops.index(products[0]) + 1 :]
    made = {v.value for v in products[0].outputs}
    for op in later:
        adds_bias = bias is not None and storage_of(bias) in {v.storage for v in op.inputs}
        if not op.is_view and not (op.name in ("aten.add", "aten.add_") and adds_bias):
            return False
        made |= {v.value for v in op.outputs}
    return call.outputs[0].value in made


def _pads_with_zeros(call: Call) -> str:
    """Return how a layer pads its input with zeros; empty if it does not."""
    layer = cast(Layer, call.module)
    if isinstance(layer, nn.Linear) or _pads_with_inputs(layer):
        return ""
    for op in call.ops:
        if op.name == "aten.constant_pad_nd" or (op.name == "aten.convolution" and any(op.args[4])):
            return "pads with zeros"
    may_pad = type(layer) not in _CONVS and any(k > 1 for k in layer.kernel_size)
    return "may pad with zeros at other input sizes" if may_pad else ""


def _pads_with_inputs(layer: Layer) -> bool:
    return type(layer) in _CONVS and layer.padding_mode != "zeros"  # type: ignore[union-attr]


def _reads_plainly(call: Call) -> bool:
    """Whether nothing but padding happens to the input before the layer's product."""
    if _pads_with_inputs(cast(Layer, call.module)):
        return True
    first = next(i for i, op in enumerate(call.ops) if is_product(op))
    return all(op.is_view or op.name in PADS for op in call.ops[:first])


def one_per_layer(flow: DataFlow, fusions: list[Fusion]) -> list[Fusion]:
    """Return one fusion for each layer, after checking that nothing else uses its weights.

    Raises:
        NotFusableError: a layer is called elsewhere too, or its weights are used elsewhere.
    """
    by_call: dict[Call, Fusion] = {}
    for fusion in fusions:
        if other := by_call.get(fusion.call):
            reason = f"{fusion.call.name} would take it twice"
            fusion = replace(fusion, affine=fusion.affine.beside(other.affine, reason))
        by_call[fusion.call] = fusion
    by_layer: dict[Layer, list[Fusion]] = {}
    for fusion in by_call.values():
        by_layer.setdefault(fusion.layer, []).append(fusion)
    for layer, found in by_layer.items():
        name, calls = found[0].call.name, flow.calls_of(layer)
        if len(found) != len(calls):
            raise NotFusableError(f"{name} runs {len(calls)} times in a forward pass")
        if not all(_equal(found[0].affine, a.affine) for a in found):
            raise NotFusableError(f"{name} would have to take a different map in each of its calls")
        if has_hooks(layer):
            raise NotFusableError(f"{name} has a forward hook")
        for tensor in (layer.weight, layer.bias):
            if tensor is not None and any(op.call not in calls for op in flow.users(tensor)):
                raise NotFusableError(f"the weights of {name} are also used elsewhere")
        if found[0].before and isinstance(layer, _TRANSPOSED):
            raise NotFusableError(f"{name}, which reads it, is a transposed convolution")
    return [found[0] for found in by_layer.values()]


def _equal(a: ChannelAffine, b: ChannelAffine) -> bool:
    """Return whether two affine maps are exactly equal."""
    if (a.shift is None) != (b.shift is None):
        return False
    pairs = [(a.scale, b.scale), (a.generic, b.generic)]
    pairs += [] if a.shift is None or b.shift is None else [(a.shift, b.shift)]
    return all(torch.equal(x, y) for x, y in pairs)


def _where(op: Op) -> str:
    return f"{op.call.name}" if op.call else f"{op.name} in {op.scope or 'the network'}"


def _scaled_rows(layer: Layer, scale: Tensor) -> Tensor:
    weight = layer.weight
    if not isinstance(layer, _TRANSPOSED):
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))  # (C_out, ...)
    # (C_in, C_out / groups, ...): input channels of group g connect to the outputs of group g.
    grouped = weight.view(layer.groups, -1, *weight.shape[1:])
    scales = scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
    return (grouped * scales).view_as(weight)


def _over_inputs(layer: Layer, values: Tensor) -> Tensor:
    """Return (C_in,) values so that they broadcast over a weight (C_out, C_in / groups, ...)."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    rows = layer.weight.shape[0] // groups
    by_row = values.view(groups, 1, -1).expand(-1, rows, -1).flatten(0, 1)
    return by_row.view(*by_row.shape, *[1] * (layer.weight.ndim - 2))


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
