"""Places for attention in a network, found in its data flow: channel gates, blocks and stages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from tinydet.backbones.module_trace import ModuleCall, channel_axis
from tinydet.reparam.dataflow import DataFlow, Value, View
from tinydet.reparam.norms import is_norm

_SUMS = ("aten.add", "aten.add_", "aten.addcmul")

Calls = dict[nn.Module, list[ModuleCall]]


@dataclass(frozen=True)
class Place:
    """A module that a new layer replaces or is appended to.

    Attributes:
        name: the module's qualified name.
        module: the module.
        channels: number of channels of the feature map it returns.
        axis: the channel axis of that map, 1 for (B, C, H, W) and 3 for (B, H, W, C).
    """

    name: str
    module: nn.Module
    channels: int
    axis: int


def channel_gates(flow: DataFlow, calls: Calls) -> list[Place]:
    """Return the outermost channel attention modules, such as squeeze-and-excitation.

    Such a module takes one feature map and returns it multiplied by one factor for each image and
    channel, which is computed from the map. On maps of one pixel any gate looks like this, so the
    example must be large enough for larger maps.
    """
    del flow
    found: list[Place] = []
    for made in list(calls.values())[1:]:
        axes = {_gated_axis(call) for call in made}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is not None and not _inside(made[0].name, (place.name for place in found)):
            _add(found, made, axis)
    return found


def residual_blocks(flow: DataFlow, calls: Calls) -> list[Place]:
    """Return a network's residual blocks, or what comes closest.

    A block class is one whose own code, in at least one instance, adds its input to a tensor
    computed from it. If a network has no such class: adds two tensors computed from its input. If
    it has none of these either: concatenates two. Classes with an instance inside a block of
    another class are excluded. The blocks are all instances of block classes that return one
    feature map, including those without the addition.
    """
    for joins in (_adds_input, _adds, _concatenates):
        kinds = {
            type(module)
            for module, made in list(calls.items())[1:]
            if next(module.children(), None) is not None and any(joins(call) for call in made)
        }
        scopes = [(made[0].name, type(m)) for m, made in calls.items() if type(m) in kinds]
        kinds -= {
            kind
            for name, kind in scopes
            if _inside(name, [outer for outer, other in scopes if other is not kind])
        }
        candidates = {module: made for module, made in calls.items() if type(module) in kinds}
        if blocks := _outputs(flow, candidates):
            return blocks
    return []


def stage_ends(flow: DataFlow, calls: Calls) -> list[Place]:
    """Return the modules whose outputs are the feature maps that the network returns.

    Of several modules with the same output the outermost is returned. Norm layers are skipped, so
    that they can still be folded. For a network that returns no feature maps (a classifier), the
    modules named in timm's `feature_info` are used.
    """
    root = next(iter(calls))
    maps = [view for view in flow.outputs if len(view.shape) == 4]
    if not maps:
        info = getattr(root, "feature_info", [])
        named = {entry["module"] for entry in info if isinstance(entry, dict)}
        ends = [made[-1].output for made in calls.values() if made[0].name in named]
        maps = [view for view in ends if view is not None and len(view.shape) == 4]
    values = [_same(flow, view.value) for view in maps]
    found: list[Place] = []
    for module, made in list(calls.items())[1:]:
        output = made[-1].output
        same = next((v for v in values if output and output.value in v), None)
        if same is None or is_norm(module):
            continue
        if places := _outputs(flow, {module: made}):
            found += places
            values.remove(same)
    return found


def _outputs(flow: DataFlow, calls: Calls) -> list[Place]:
    """Return the outermost modules that always return one map with the same number of channels."""
    found: list[Place] = []
    for made in calls.values():
        if _inside(made[0].name, (place.name for place in found)):
            continue
        maps = [call.output for call in made if call.output and len(call.output.shape) == 4]
        axes = {channel_axis(flow, view) for view in maps}
        axis = axes.pop() if len(axes) == 1 else None
        if axis in (1, 3) and len(maps) == len(made):
            _add(found, made, axis)
    return found


def _add(found: list[Place], made: list[ModuleCall], axis: int) -> None:
    widths = {call.output.shape[axis] for call in made if call.output}
    if len(widths) == 1:
        found.append(Place(made[0].name, made[0].module, widths.pop(), axis))


def _inside(name: str, scopes: Iterable[str]) -> bool:
    return any(name.startswith(f"{scope}.") for scope in scopes)


def _gated_axis(call: ModuleCall) -> int | None:
    """Return the channel axis if a module multiplies its input by a gate computed from it."""
    maps = [view for view in call.inputs if len(view.shape) == 4]
    if call.output is None or len(maps) != 1 or call.output.shape != maps[0].shape:
        return None
    given = maps[0]
    made = [op for op in call.ops if any(v.value == call.output.value for v in op.outputs)]
    products = [op for op in made if op.name in ("aten.mul", "aten.mul_")]
    if len(products) != 1 or len(products[0].inputs) != 2:
        return None
    sides = [view for view in products[0].inputs if view.value != given.value]
    if len(sides) != 1 or sides[0].value not in _computed_from(call):
        return None
    # The gate's size along each axis, expanded axes (stride 0) counted as 1.
    gate = sides[0]
    shape = (1,) * (4 - len(gate.shape)) + gate.shape
    stride = (0,) * (4 - len(gate.stride)) + gate.stride
    extent = [1 if step == 0 else n for n, step in zip(shape, stride, strict=True)]
    for axis, places in ((1, (2, 3)), (3, (1, 2))):
        pooled = all(extent[i] == 1 for i in places)
        larger = any(given.shape[i] > 1 for i in places)
        if pooled and larger and extent[axis] == given.shape[axis] > 1:
            return axis
    return None


def _adds_input(call: ModuleCall) -> bool:
    memory = {view.storage for view in call.inputs}
    return any(memory & {view.storage for view in sides} for sides in _joined(call, _SUMS))


def _adds(call: ModuleCall) -> bool:
    return bool(_joined(call, _SUMS))


def _concatenates(call: ModuleCall) -> bool:
    return bool(_joined(call, ("aten.cat",)))


def _joined(call: ModuleCall, names: tuple[str, ...]) -> list[list[View]]:
    """Return the operands, computed from its inputs, that a module's own code joins to a map."""
    if call.output is None or len(call.output.shape) != 4:
        return []
    own = [op for op in call.ops if op.scope == call.name and op.name in names]
    inside = _computed_from(call) if own else set()
    # Only maps of the output's size; the number of channels may differ.
    own = [op for op in own if _axes_that_differ(op.outputs[0].shape, call.output.shape) <= 1]
    sides = [[view for view in op.inputs if view.value in inside] for op in own]
    return [views for views in sides if len({view.value for view in views}) > 1]


def _axes_that_differ(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else max(len(a), 2)


def _computed_from(call: ModuleCall) -> set[Value]:
    """Return the tensor arguments of a call and all values computed from them."""
    found = {view.value for view in call.inputs}
    for op in call.ops:
        if any(view.value in found for view in op.inputs):
            found.update(view.value for view in op.outputs)
    return found


def _same(flow: DataFlow, value: Value) -> list[Value]:
    """Return a value and the values it is a copy of."""
    values = [value]
    op = flow.producer(value)
    while op is not None and op.name in ("aten.clone", "aten._to_copy") and op.inputs:
        values.append(op.inputs[0].value)
        op = flow.producer(values[-1])
    return values
