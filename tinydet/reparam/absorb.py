"""The layers that can take a scale and a shift of their output, or of their input, as their own.

    s (W x + b) + t = (s W) x + (s b + t)          W (s x + t) + b = (W s) x + (W t + b)

Which layers these are is read from the observed data flow, never from names or order. On the way
to them a map passes whatever keeps channels apart: views, copies, sums, concatenations, pools.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tinydet.reparam.affine import is_product
from tinydet.reparam.channel_map import POOLS, ChannelMap, NotMovableError
from tinydet.reparam.dataflow import Call, DataFlow, Op, View, storage_of
from tinydet.reparam.replacing import has_hooks

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PADS = ("aten.constant_pad_nd", "aten.reflection_pad2d", "aten.replication_pad2d", "aten.clone")
SUMS = ("aten.add", "aten.add_", "aten.sub", "aten.sub_")


@dataclass(frozen=True)
class Absorber:
    """A layer and the scale and shift that it takes into its weights.

    Attributes:
        call: the call of the layer.
        mapping: (C,) tensors, over its output channels, or over its input channels if `before`.
        before: the map comes before the layer.
    """

    call: Call
    mapping: ChannelMap
    before: bool

    def apply(self) -> None:
        """Change the layer's weight and bias in place."""
        layer, scale, shift = self.call.module, self.mapping.scale, self.mapping.shift
        weight, bias = layer.weight, layer.bias
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
                new_bias = shift if bias is None else new_bias + shift
        layer.weight = _parameter(new_weight, weight)
        if new_bias is not None:
            layer.bias = _parameter(new_bias, weight if bias is None else bias)


def apply_all(absorbers: list[Absorber]) -> str:
    """Change all the layers, and name them."""
    for absorber in absorbers:
        absorber.apply()
    return f"into {', '.join(a.call.name for a in absorbers)}"


def behind(flow: DataFlow, view: View, readers: set[Op], mapping: ChannelMap) -> list[Absorber]:
    """Return the layers that can take a map of what they make.

    Args:
        flow: the observed pass.
        view: the tensor the map is applied to, as its readers see it.
        readers: the operations that apply it; there must be no others.
        mapping: the map.

    Raises:
        NotMovableError: some of that tensor does not come from a layer alone.
    """
    op = flow.producer(view.value)
    if op is None:
        raise NotMovableError("its input is the network's input, no output of a layer")
    maker = _where(op)
    if flow.is_returned(view.value):
        raise NotMovableError(f"the output of {maker} is also an output of the network")
    for other in flow.readers(view.value):
        if other not in readers:
            raise NotMovableError(f"the output of {maker} is also used by {_where(other)}")
    out = next(v for v in op.outputs if v.value == view.value)
    mapping = mapping.seen_as(view, out)
    call = op.call
    if call is not None and is_layer_call(call) and call.outputs[0].value == view.value:
        mapping = mapping.seen_as(out, call.outputs[0])
        axis = -1 if isinstance(call.module, nn.Linear) else 1
        return [Absorber(call, mapping.along(axis), before=False)]
    data = flow.depends_on_input()
    inputs = [v for v in op.inputs if v.value in data]
    if op.name == "aten.clone":
        return behind(flow, inputs[0], {op}, mapping)
    if op.name in POOLS and len(inputs) == 1:
        return behind(flow, inputs[0], {op}, mapping.past_pool(op, forward=False))
    if op.name in SUMS and len(op.inputs) == len(inputs) == 2 and not op.kwargs:
        first, second = inputs
        if first.shape == second.shape == out.shape and first.value != second.value:
            # The shift is added once. A difference's second side has the same factor.
            rest = replace(mapping, shift=None)
            return [*behind(flow, first, {op}, mapping), *behind(flow, second, {op}, rest)]
    if op.name == "aten.cat" and len(inputs) == len(op.inputs) == len({v.value for v in inputs}):
        return _behind_concatenation(flow, op, inputs, mapping)
    raise NotMovableError(f"its input comes from {maker}, not from a conv or linear layer")


def _behind_concatenation(
    flow: DataFlow, op: Op, inputs: list[View], mapping: ChannelMap
) -> list[Absorber]:
    axis = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % len(inputs[0].shape)

    found, start = [], 0
    for view in inputs:
        length = view.shape[axis]

        def part(values: Tensor, start: int = start, length: int = length) -> Tensor:
            return values if values.shape[axis] == 1 else values.narrow(axis, start, length)

        found += behind(flow, view, {op}, mapping.changed(part))
        start += length
    return found


def ahead(flow: DataFlow, view: View, mapping: ChannelMap) -> list[Absorber]:
    """Return the layers, all that read a tensor, that can take a map of what they read.

    Args:
        flow: the observed pass.
        view: the tensor that the map makes.
        mapping: the map.

    Raises:
        NotMovableError: not every reader can.
    """
    if flow.is_returned(view.value):
        raise NotMovableError("its output is also an output of the network")
    found = []
    readers = flow.readers(view.value)
    if not readers:
        raise NotMovableError("its output is not used")
    for op in readers:
        for seen in (v for v in op.inputs if v.value == view.value):
            there = mapping.seen_as(view, seen)
            call = op.call
            if (
                call is not None
                and is_layer_call(call)
                and _reads_plainly(call)
                and call.inputs[0].value == view.value
            ):
                axis = -1 if isinstance(call.module, nn.Linear) else 1
                there = there.seen_as(seen, call.inputs[0]).along(axis)
                if there.shift is not None and _pads_with_zeros(call):
                    raise NotMovableError(
                        f"{call.name}, which reads it, pads with zeros: those would be shifted too"
                    )
                found.append(Absorber(call, there, before=True))
            elif op.name == "aten.clone":
                found += ahead(flow, op.outputs[0], there)
            elif op.name in POOLS and op.inputs[0] == seen:
                found += ahead(flow, op.outputs[0], there.past_pool(op, forward=True))
            else:
                raise NotMovableError(f"its output is used by {_where(op)}")
    return found


def is_layer_call(call: Call) -> bool:
    """Whether a call is no more than x -> W x + b with the module's own weight and bias.

    Decided by the operations that ran, so that subclasses with another padding are taken, and
    those that change the weight on the fly or treat the output further are not.
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


def _pads_with_zeros(call: Call) -> bool:
    layer = call.module
    if isinstance(layer, nn.Linear):
        return False
    for op in call.ops:
        if op.name == "aten.constant_pad_nd" or (op.name == "aten.convolution" and any(op.args[4])):
            return True
    # A layer of another kind may pad at another size of its input.
    return type(layer) not in _CONVS and any(k > 1 for k in layer.kernel_size)


def _reads_plainly(call: Call) -> bool:
    """Whether the layer's product is the first thing that happens to its input, padding aside."""
    first = next(i for i, op in enumerate(call.ops) if is_product(op))
    return all(op.is_view or op.name in _PADS for op in call.ops[:first])


def check_whole(flow: DataFlow, absorbers: list[Absorber]) -> list[Absorber]:
    """Return one absorber for each layer, if nothing else depends on the layers' weights.

    Raises:
        NotMovableError: a layer is called elsewhere too, or its weights are used elsewhere.
    """
    by_layer: dict[nn.Module, list[Absorber]] = {}
    for absorber in absorbers:
        by_layer.setdefault(absorber.call.module, []).append(absorber)
    for layer, found in by_layer.items():
        name, calls = found[0].call.name, flow.calls_of(layer)
        if len({a.call for a in found}) != len(calls) or len(found) != len(calls):
            raise NotMovableError(f"{name} runs {len(calls)} times in a forward pass")
        if not all(same(found[0].mapping, a.mapping) for a in found):
            raise NotMovableError(f"{name} would have to take a different map in each of its calls")
        if has_hooks(layer):
            raise NotMovableError(f"{name} has a forward hook")
        for tensor in (layer.weight, layer.bias):
            if tensor is not None and any(op.call not in calls for op in flow.users(tensor)):
                raise NotMovableError(f"the weights of {name} are also used elsewhere")
        if found[0].before and isinstance(layer, _TRANSPOSED):
            raise NotMovableError(f"{name}, which reads it, is a transposed convolution")
    return [found[0] for found in by_layer.values()]


def same(a: ChannelMap, b: ChannelMap) -> bool:
    """Return whether two maps are equal, to the last digit."""
    if (a.shift is None) != (b.shift is None):
        return False
    pairs = [(a.scale, b.scale), (a.generic, b.generic)]
    pairs += [] if a.shift is None or b.shift is None else [(a.shift, b.shift)]
    return all(torch.equal(x, y) for x, y in pairs)


def _where(op: Op) -> str:
    return f"{op.call.name}" if op.call else f"{op.name} in {op.scope or 'the network'}"


def _scaled_rows(layer: nn.Module, scale: Tensor) -> Tensor:
    weight = layer.weight
    if not isinstance(layer, _TRANSPOSED):
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))  # (C_out, ...)
    # (C_in, C_out / groups, ...): input channels of group g meet the outputs of group g.
    grouped = weight.view(layer.groups, -1, *weight.shape[1:])
    scales = scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
    return (grouped * scales).view_as(weight)


def _over_inputs(layer: nn.Module, values: Tensor) -> Tensor:
    """Return (C_in,) values laid over a weight (C_out, C_in / groups, ...)."""
    groups = getattr(layer, "groups", 1)
    rows = layer.weight.shape[0] // groups
    laid = values.view(groups, 1, -1).expand(-1, rows, -1).flatten(0, 1)  # (C_out, C_in / groups)
    return laid.view(*laid.shape, *[1] * (layer.weight.ndim - 2))


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
