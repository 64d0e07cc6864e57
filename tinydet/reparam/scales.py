"""Norms, and constant factors, taken into the convolutions and linear layers next to them.

A batch norm in inference and a LayerScale are a scale and a shift of each channel. The layers that
make their input take it; if these cannot, the layers that read their output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tinydet.reparam.absorb import Absorber, ahead, behind, check_whole
from tinydet.reparam.affine import is_affine, is_layer
from tinydet.reparam.channel_map import ChannelMap, NotMovableError
from tinydet.reparam.code import NotTraceableError, as_module, erase_unused, observe_nodes, trace
from tinydet.reparam.dataflow import Call, DataFlow, Op, Value
from tinydet.reparam.norms import is_norm, scale_and_shift, why_not_linear, without_norm
from tinydet.reparam.replacing import (
    calls_recorded,
    give_hooks,
    has_hooks,
    has_pre_hooks,
    hooks_off,
    replace_module,
)
from tinydet.reparam.report import Step
from tinydet.reparam.rounds import Change, RefusedError, change_in_rounds
from tinydet.reparam.verify import copied

_FACTORS = ("aten.mul", "aten.mul_", "aten.div", "aten.div_")
_SUMS = ("aten.add", "aten.add_", "aten.sub", "aten.sub_")


def fold_scales(
    model: nn.Module, checks: list[tuple[Any, ...]]
) -> tuple[nn.Module, list[Step], list[Step]]:
    """Fold every norm and every constant factor that a layer can take over.

    Args:
        model: the network in eval mode and float64; changed in place.
        checks: positional arguments for forward passes; the first are for the observed ones.

    Returns:
        The network (another object if a factor was in its own code), what was folded, and every
        norm that stays with its reason.
    """
    kept: dict[str, str] = {}

    def find(model: nn.Module, flow: DataFlow, refused: Mapping[str, str]) -> list[Change]:
        kept.clear()
        return [
            *_norms(model, flow, kept),
            *_scale_modules(flow),
            *_factors(model, checks[0], flow, refused),
        ]

    model, done, refused = change_in_rounds(model, checks, find)
    norms = [name for name, module in model.named_modules() if is_norm(module)]
    return model, done, [Step(n, refused.get(n) or kept[n]) for n in norms]


def _norms(model: nn.Module, flow: DataFlow, kept: dict[str, str]) -> list[Change]:
    found = []
    for name, module in model.named_modules():
        if is_norm(module):
            try:
                found.append(_change(name, module, _norm_absorbers(flow, module)))
            except NotMovableError as reason:
                kept[name] = str(reason)
    return found


def _scale_modules(flow: DataFlow) -> list[Change]:
    """Find modules that multiply by constants, such as a LayerScale."""
    data = flow.depends_on_input()
    found = []
    scales: dict[nn.Module, list[Call]] = {}
    for call in flow.calls:
        if not is_norm(call.module) and _only_scales(call, data):
            scales.setdefault(call.module, []).append(call)
    for module, calls in scales.items():
        try:
            maps = [(call, _map_of_call(call)) for call in calls]
            absorbers = _absorbers(flow, maps, backward_only=True)
        except NotMovableError:
            continue
        found.append(_change(calls[0].name, module, absorbers))
    return found


def _change(name: str, module: nn.Module, absorbers: list[Absorber]) -> Change:
    """Return the change by which layers take over what a module does."""

    def make(model: nn.Module) -> tuple[nn.Module, str]:
        _remove_module(model, module)
        return model, _apply(absorbers)

    return Change(name, frozenset((module, *(a.call.module for a in absorbers))), make)


def _apply(absorbers: list[Absorber]) -> str:
    for absorber in absorbers:
        absorber.apply()
    return f"into {', '.join(a.call.name for a in absorbers)}"


def _factors(
    model: nn.Module, inputs: tuple[Any, ...], flow: DataFlow, refused: Mapping[str, str]
) -> list[Change]:
    """Find multiplications by constants in the code of modules."""
    data = flow.depends_on_input()
    found: list[tuple[str, nn.Module, Op, list[Absorber]]] = []
    for number, op in enumerate(flow.ops):
        if op.name not in _FACTORS or not _is_factor(op, data):
            continue
        name = f"{op.name.removeprefix('aten.')} in {op.scope or 'the network'} ({number})"
        module = model.get_submodule(op.scope)
        if is_norm(module) or name in refused:
            continue
        if op.call is not None and _only_scales(op.call, data):
            continue
        (view,) = [v for v in op.inputs if v.value in data]
        try:
            absorbers = check_whole(flow, behind(flow, view, {op}, _map_of_factor(op, data)))
        except NotMovableError:
            continue
        found.append((name, module, op, absorbers))
    if not found:
        return []
    with calls_recorded([module for _, module, _, _ in found]) as records, torch.no_grad():
        model(*copied(inputs))

    def change(name: str, module: nn.Module, op: Op, absorbers: list[Absorber]) -> Change:
        def make(model: nn.Module) -> tuple[nn.Module, str]:
            try:
                new = _without_factor(module, records.get(module), flow, op)
            except NotTraceableError as error:
                raise RefusedError(str(error)) from error
            if module is model:
                model = new
            else:
                replace_module(model, module, new)
            return model, _apply(absorbers)

        return Change(name, frozenset((module, *(a.call.module for a in absorbers))), make)

    return [change(*one) for one in found]


def _norm_absorbers(flow: DataFlow, norm: nn.Module) -> list[Absorber]:
    if reason := why_not_linear(norm):
        raise NotMovableError(reason)
    calls = flow.calls_of(norm)
    if not calls:
        raise NotMovableError("it runs 0 times in a forward pass")
    if has_pre_hooks(norm):
        raise NotMovableError("it has a forward pre-hook")
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if tensor is not None and any(op.call not in calls for op in flow.users(tensor)):
            raise NotMovableError("its weights are also used elsewhere")
    maps = []
    for call in calls:
        around = [1] * (len(call.inputs[0].shape) - 2)
        scale, shift = (values.view(1, -1, *around) for values in scale_and_shift(norm))
        maps.append((call, ChannelMap.of(scale, shift)))
    ends = isinstance(without_norm(norm), nn.Identity) and not has_hooks(norm)
    return _absorbers(flow, maps, backward_only=not ends)


def _absorbers(
    flow: DataFlow, maps: list[tuple[Call, ChannelMap]], backward_only: bool
) -> list[Absorber]:
    """Return the layers that take a module's maps in all of its calls."""
    try:
        return check_whole(
            flow,
            [a for call, m in maps for a in behind(flow, call.inputs[0], set(call.ops), m)],
        )
    except NotMovableError as reason:
        if backward_only:
            raise
        try:
            return check_whole(
                flow, [a for call, m in maps for a in ahead(flow, call.outputs[0], m)]
            )
        except NotMovableError as second:
            raise NotMovableError(f"{reason}; {second}") from second


def _only_scales(call: Call, data: set[Value]) -> bool:
    """Whether a call multiplies its input by constants, and adds some, and does nothing else."""
    if len(call.inputs) != 1 or len(call.outputs) != 1 or has_hooks(call.module):
        return False
    if call.inputs[0].shape != call.outputs[0].shape or call.inputs[0].value not in data:
        return False
    work = [op for op in call.ops if not op.is_view and any(v.value in data for v in op.inputs)]
    elementwise = all(
        op.name in (*_FACTORS, *_SUMS)
        and sum(v.value in data for v in op.inputs) == 1
        and is_affine(op, data)
        for op in work
    )
    return elementwise and any(op.name in _FACTORS for op in work)


def _map_of_call(call: Call) -> ChannelMap:
    """Return what a module does to its input, the same for inputs of every size that it takes.

    Raises:
        NotMovableError: it does something else to an input of another size.
    """
    shape = list(call.inputs[0].shape)
    asked = _asked(call, shape)
    for axis in range(len(shape)):
        try:
            longer = _asked(call, [n + (a == axis) for a, n in enumerate(shape)])
        except RuntimeError:
            continue  # The axis of its weights, whose length is fixed.
        for values, more in zip(asked, longer, strict=True):
            if not torch.equal(values.narrow(axis, 0, 1).expand_as(more), more):
                raise NotMovableError("its factor depends on the place or the size of its input")
        asked = [values.narrow(axis, 0, 1) for values in asked]
        shape[axis] = 1
    scale, shift = asked
    shifts = any(op.name in _SUMS for op in call.ops)
    return ChannelMap.of(scale, shift if shifts else None)


def _asked(call: Call, shape: Sequence[int]) -> list[Tensor]:
    """Return the scale and the shift that a module applies to an input of this shape."""
    with hooks_off(call.module), torch.no_grad():
        zero = call.module(torch.zeros(shape, dtype=torch.float64))
        one = call.module(torch.ones(shape, dtype=torch.float64))
    return [one - zero, zero]


def _is_factor(op: Op, data: set[Value]) -> bool:
    varying = [v for v in op.inputs if v.value in data]
    return len(varying) == 1 and is_affine(op, data) and varying[0].shape == op.outputs[0].shape


def _map_of_factor(op: Op, data: set[Value]) -> ChannelMap:
    view = next(v for v in op.inputs if v.value in data)
    address = view.storage
    other = next(
        a for a in op.args[:2]
        if not isinstance(a, Tensor) or a.untyped_storage().data_ptr() != address
    )  # fmt: skip
    tensors = [t for t in op.args[:2] if isinstance(t, Tensor)]
    factor = torch.as_tensor(other, dtype=tensors[0].dtype)
    if "div" in op.name:
        factor = 1.0 / factor
    return ChannelMap.of(factor.view(*[1] * (len(view.shape) - factor.ndim), *factor.shape))


def _remove_module(model: nn.Module, module: nn.Module) -> None:
    rest = without_norm(module) if is_norm(module) else nn.Identity()
    if has_hooks(module):
        # An activation may be shared between norms: their hooks go on a module of their own.
        rest = nn.Sequential(rest)
        give_hooks(module, rest)
    replace_module(model, module, rest)


def _without_factor(
    module: nn.Module, record: tuple[Any, Any, Any] | None, flow: DataFlow, op: Op
) -> nn.Module:
    """Return a module whose code no longer multiplies by a factor.

    Raises:
        NotTraceableError: its code is not a plain graph in which the factor is seen.
    """
    if record is None:
        raise NotTraceableError("its code does not run as a module's call")
    args, kwargs, _ = record
    with hooks_off(module):
        graph = trace(module, args, kwargs)
        data = observe_nodes(graph, copied(args)).depends_on_input()
    # Constants may be computed anew in the traced code: what varies must be the same.
    varying = flow.depends_on_input()
    own = [o for o in flow.ops if o.scope == op.scope and _varies(o, varying)]
    traced = [
        (node, o)
        for node in graph.graph.nodes
        if node.op in ("call_function", "call_method")
        for o in node.meta["ops"]
        if _varies(o, data)
    ]
    if [o.name for o in own] != [o.name for _, o in traced]:
        raise NotTraceableError("its code runs other operations when traced")
    node = traced[own.index(op)][0]
    source = _only_multiplies(node, data)
    node.replace_all_uses_with(source)
    erase_unused(graph.graph, [node])
    graph.recompile()
    return as_module(graph, module)


def _varies(op: Op, data: set[Value]) -> bool:
    return any(v.value in data for v in op.inputs)


def _only_multiplies(node: fx.Node, data: set[Value]) -> fx.Node:
    varying = [i for i in node.all_input_nodes if any(v.value in data for v in i.meta["views"])]
    work = [o for o in node.meta["ops"] if not o.is_view]
    if len(varying) != 1 or len(work) != 1:
        raise NotTraceableError("the factor is not an operation of its own")
    if any(_depends_on_an_argument(i) for i in node.all_input_nodes if i is not varying[0]):
        raise NotTraceableError("the factor depends on the size of an input")
    return varying[0]


def _depends_on_an_argument(node: fx.Node) -> bool:
    return node.op == "placeholder" or any(_depends_on_an_argument(i) for i in node.all_input_nodes)


def count_scales(flow: DataFlow) -> int:
    """Count the constant tensors that a layer's output is multiplied by before anything else.

    A norm, a view or another factor may come between; another reader of the output may not.
    """
    data = flow.depends_on_input()
    return sum(
        op.name in _FACTORS
        and len(op.inputs) == 2
        and _is_factor(op, data)
        and _follows_a_layer(flow, op, data)
        for op in flow.ops
    )


def _follows_a_layer(flow: DataFlow, op: Op, data: set[Value]) -> bool:
    while True:
        (view,) = [v for v in op.inputs if v.value in data]
        made = flow.producer(view.value)
        if made is None or len(flow.readers(view.value)) > 1 or flow.is_returned(view.value):
            return False
        if is_layer(made, data):
            return True
        alone = sum(v.value in data for v in made.inputs) == 1
        if not alone or made.name not in (*_FACTORS, "aten.native_batch_norm", "aten.clone"):
            return False
        op = made
