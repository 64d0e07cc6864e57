"""Merge parallel branches, and layers in series, into single convolutions or linear layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, fx, nn

from tinydet.reparam import affine
from tinydet.reparam.apply_changes import Change, Network, RefusedError, apply_changes
from tinydet.reparam.dataflow import Call, DataFlow, Op, Value, View, named, observe
from tinydet.reparam.equivalent_layer import checked_layer, equivalent_layer, find_geometry
from tinydet.reparam.fuse_affine import Layer, is_layer_call
from tinydet.reparam.fx_graph import NotTraceableError, observe_nodes, single_call, trace
from tinydet.reparam.geometry import Geometry, NotAConvolutionError
from tinydet.reparam.linear_map import LinearMap, NotSupportedError, weights_of
from tinydet.reparam.linear_subgraph import (
    extract_subgraph,
    linear_subgraphs,
    replace_subgraph,
    writes,
)
from tinydet.reparam.module_swap import Replacements, has_hooks, hooks_disabled, record_calls
from tinydet.reparam.norms import is_norm
from tinydet.reparam.report import Step
from tinydet.reparam.rewrite import as_replacement, rewrite
from tinydet.reparam.verify import TOLERANCE, copied, difference

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def merge_branches(network: Network) -> tuple[list[Step], list[Step]]:
    """Replace linear subgraphs with parallel branches by their equivalent layers.

    Args:
        network: changed in place.

    Returns:
        What was merged, and the branches that remain with the reason.
    """
    left: dict[str, Op] = {}

    def find(model: nn.Module, flow: DataFlow, refused: Mapping[str, str]) -> list[Change]:
        left.clear()
        left.update(named(affine.branch_sums(flow)))
        scopes: set[str] = set()
        for op in left.values():
            # If the branches start outside of the module that adds them, try its parents.
            scope = next((s for s in _ancestors(op.scope) if s not in refused), None)
            if scope is not None:
                scopes.add(scope)
        modules = {name: model.get_submodule(name) for name in sorted(scopes, key=_depth)}
        if not modules:
            return []
        with record_calls(list(modules.values())) as records:
            network.examples[0].run(model)
        return [
            Change(
                name,
                frozenset(module.modules()),
                partial(
                    _merge, module, records.get(module), _is_linear(flow, name), module is model
                ),
            )
            for name, module in modules.items()
        ]

    done, refused = apply_changes(network, find)
    return done, [Step(n, f"branches stay: {refused.get(op.scope)}") for n, op in left.items()]


def _ancestors(scope: str) -> list[str]:
    names = scope.split(".")
    return [".".join(names[:n]) for n in range(len(names), 0, -1)] + ([""] if scope else [])


def _depth(scope: str) -> int:
    return len(scope.split(".")) if scope else 0


def _is_linear(flow: DataFlow, name: str) -> bool:
    """Whether all that runs in a module is linear."""
    data = flow.depends_on_input()
    inside = f"{name}." if name else ""
    return all(
        affine.is_affine(op, data) or affine.sums_a_stack(op, flow)
        for op in flow.ops
        if (op.scope == name or op.scope.startswith(inside)) and op.varying(data)
    )


def _merge(
    module: nn.Module, record: tuple[Any, Any, Any] | None, linear: bool, keep: bool
) -> tuple[str, Replacements]:
    """Merge the linear subgraphs in one module of a network (a `Change.make`)."""
    kind = type(module).__name__
    if record is None:
        raise RefusedError("its code is TorchScript, or does not run as a module's call")
    try:
        try:
            if not linear:
                raise NotAConvolutionError("it is not linear")
            new, layers = _merge_module(module, *record, keep)
        except NotAConvolutionError:
            new, layers = _merge_subgraphs(module, *record, keep)
    except (NotTraceableError, NotAConvolutionError) as error:
        raise RefusedError(str(error)) from error
    return f"{kind} merged into {', '.join(layers)}", {module: new} if new is not module else {}


def _merge_module(
    module: nn.Module, args: Any, kwargs: Any, output: Any, keep: bool
) -> tuple[nn.Module, list[str]]:
    """Return the layer that is equivalent to a whole module, which need not be traceable.

    Raises:
        NotAConvolutionError: there is none.
    """
    if (
        kwargs
        or len(args) != 1
        or not isinstance(args[0], Tensor)
        or not isinstance(output, Tensor)
    ):
        raise NotAConvolutionError("it does more than turn one tensor into another")
    if type(module) in _LAYERS:
        raise NotAConvolutionError("it is one layer, to whose output a hook adds")
    if any(has_hooks(child) for child in module.modules() if child is not module):
        raise NotAConvolutionError("a module inside has a forward hook or is TorchScript")
    with hooks_disabled(module):
        flow = observe(module, copied(args), is_leaf=is_norm)
        data = flow.depends_on_input()
        varying = [op for op in flow.ops if op.varying(data)]
        given = {view.storage for view in flow.inputs}
        linear = (affine.is_affine(op, data) or affine.sums_a_stack(op, flow) for op in varying)
        if not all(linear) or any(writes(op, given) for op in varying):
            raise NotAConvolutionError("it is not linear")
        if affine.crops(flow.ops, data, flow.outputs[0]):
            raise NotAConvolutionError("it reads a fixed part of its input")
        layer, geometry = _one_layer(module, flow, flow.ops, flow.inputs[0], flow.outputs[0])
    if keep:
        return rewrite(module, single_call(module, args, layer), keep), [str(geometry)]
    return as_replacement(layer, module), [str(geometry)]


def _merge_subgraphs(
    module: nn.Module, args: Any, kwargs: Any, output: Any, keep: bool
) -> tuple[nn.Module, list[str]]:
    """Merge the linear subgraphs in a module's code; see `rewrite` for `keep`.

    Returns:
        The module, or its replacement, and descriptions of the new layers.

    Raises:
        NotTraceableError: its code cannot be traced.
        NotAConvolutionError: no subgraph was merged.
    """
    graph = trace(module, args, kwargs)
    layers: list[str] = []
    tried: set[str] = set()
    reasons: list[str] = []
    flow = observe_nodes(graph)
    while layer := _merge_one(graph, flow, tried, reasons):
        layers.append(layer)
        flow = observe_nodes(graph)
    if not layers:
        raise NotAConvolutionError(reasons[0] if reasons else "its branches have no one source")
    found = difference(output, flow.returned)
    if not found.max_rel <= TOLERANCE:
        raise NotAConvolutionError(f"merged, it differs by {found.max_rel:.1e} of its output")
    return rewrite(module, graph, keep), layers


def _merge_one(
    graph: fx.GraphModule, flow: DataFlow, tried: set[str], reasons: list[str]
) -> str | None:
    """Replace the last subgraph of a graph that can be merged, and describe the new layer."""
    data = flow.depends_on_input()
    for last in reversed(graph.graph.nodes):
        if last.name in tried:
            continue
        for found in reversed(linear_subgraphs(graph, last, flow, data)):
            tried.add(last.name)
            source, out = (node.meta["views"][0] for node in (found.source, last))
            try:
                if affine.crops(found.ops, data, out):
                    raise NotAConvolutionError("it reads a fixed part of its input")
                part = extract_subgraph(graph, found, data)
                layer, geometry = _one_layer(part, flow, found.ops, source, out)
            except NotAConvolutionError as error:
                reasons.append(str(error))
                continue
            replace_subgraph(graph, found, layer)
            return str(geometry)
    return None


def merge_series(network: Network) -> list[Step]:
    """Merge pairs of layers of which the second is the only reader of the first, where cheaper.

    Cheaper means fewer multiply-adds, or as many and fewer weights: two 1x1 convolutions around a
    bottleneck stay, two with an expansion between them become one.

    Args:
        network: changed in place.

    Returns:
        What was merged.
    """

    def find(model: nn.Module, flow: DataFlow, refused: Mapping[str, str]) -> list[Change]:
        del model, refused
        return [
            Change(
                f"{first.name} and {second.name}",
                frozenset((first.module, second.module)),
                partial(_merge_pair, flow, first, second),
            )
            for first, second in _series(flow)
        ]

    done, _ = apply_changes(network, find)
    return done


def _merge_pair(flow: DataFlow, first: Call, second: Call) -> tuple[str, Replacements]:
    """Merge two layers of a network (a `Change.make`)."""
    pair = nn.Sequential(first.module, second.module)
    ops = [*first.ops, *second.ops]
    try:
        source, out = first.inputs[0], second.outputs[0]
        layer, geometry = _one_layer(pair, flow, ops, source, out, cheaper=True)
    except NotAConvolutionError as error:
        raise RefusedError(str(error)) from error
    return f"merged into {geometry}", {first.module: layer, second.module: nn.Identity()}


def _series(flow: DataFlow) -> Iterator[tuple[Call, Call]]:
    for first in flow.calls:
        if not is_layer_call(first) or not _is_independent(flow, first):
            continue
        made = first.outputs[0]
        readers = flow.readers(made.value)
        second = readers[0].call if readers else None
        if second is None or flow.is_returned(made.value) or not is_layer_call(second):
            continue
        alone = all(op.call is second for op in readers) and second.inputs == (made,)
        alone = alone and second.module is not first.module
        if alone and _is_independent(flow, second) and _may_be_cheaper(first.module, second.module):
            yield first, second


def _may_be_cheaper(first: Any, second: Any) -> bool:
    """Whether one layer in place of two may need fewer multiply-adds or weights than they do."""
    own = getattr(first, "groups", 1)
    groups = math.gcd(own, getattr(second, "groups", 1))
    inputs = first.weight.shape[1] * own // groups
    taps = max(math.prod(layer.weight.shape[2:]) for layer in (first, second))  # or more
    weights: int = first.weight.numel() + second.weight.numel()
    return len(second.weight) * inputs * taps <= weights


def _is_independent(flow: DataFlow, call: Call) -> bool:
    """Whether this is a standard layer that runs once and shares no weights."""
    layer = cast(Layer, call.module)
    weights = [t for t in (layer.weight, layer.bias) if t is not None]
    return (
        type(layer) in _LAYERS
        and not has_hooks(layer)
        and all(op.call is call for weight in weights for op in flow.users(weight))
        and len(flow.calls_of(layer)) == 1
    )


def _one_layer(
    module: nn.Module, flow: DataFlow, ops: list[Op], source: View, out: View, cheaper: bool = False
) -> tuple[nn.Module, Geometry]:
    """Return the layer that is equivalent to a module.

    Args:
        module: takes the source and returns the output.
        flow: a forward pass that contains the module's.
        ops: the operations that run in it.
        source: its observed input.
        out: its observed output.
        cheaper: the layer must have fewer multiply-adds, or as many and fewer weights.

    Raises:
        NotAConvolutionError: there is none, or it costs more than the module.
    """
    products = [op for op in ops if affine.is_product(op)]
    kernels = [op.args[1].ndim - 2 for op in products if op.name == "aten.convolution"]
    axes = kernels[0] if kernels else 0
    if axes and len(source.shape) != axes + 2:
        raise NotAConvolutionError("its input has no batch axis")
    if not axes:
        module = _Rows(module, len(source.shape) - 2)
    gcd = math.gcd(*(_groups(op) for op in products))
    groups = sorted({gcd, 1}, reverse=True)
    positions = math.prod(out.shape) // (out.shape[1] if axes else out.shape[-1])
    before = affine.multiply_adds(ops)
    linear = LinearMap(flow.ops, flow.depends_on_input(), source, out, axes, weights_of(module))
    by_rules = True
    try:
        try:
            geometry = linear.geometry(groups)
        except NotSupportedError:
            by_rules = False
            reach, stride = _extent(ops, source)
            most = before / positions
            geometry = find_geometry(module, linear.channels, axes, groups, reach, stride, most)
    except NotAConvolutionError:
        raise
    except Exception as error:
        # The code of any network may raise anything.
        raise NotAConvolutionError(f"it does not run alone ({type(error).__name__})") from error
    after = geometry.multiply_adds(positions)
    weights = sum(parameter.numel() for parameter in module.parameters())
    fewer = after < before or geometry.multiply_adds(1) < weights
    if after > before or (cheaper and not fewer):
        raise NotAConvolutionError(f"as {geometry} it costs more")
    if by_rules:
        layer = checked_layer(module, geometry, *linear.weight_and_bias(geometry))
    else:
        layer = equivalent_layer(module, geometry)
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return layer.requires_grad_(any(trained) or not trained), geometry


def _groups(op: Op) -> int:
    return op.args[8] if op.name == "aten.convolution" else 1


def _extent(ops: list[Op], source: View) -> tuple[int, int]:
    """Return an upper bound of how far the operations look in their source, and the stride."""
    seen: dict[Value, tuple[int, int]] = {source.value: (0, 1)}
    for op in ops:
        inputs = [seen[view.value] for view in op.inputs if view.value in seen]
        if inputs:
            far, step = (max(numbers) for numbers in zip(*inputs, strict=True))
            reached = (far + step * affine.reach(op), step * affine.stride(op))
            for view in op.outputs:
                seen[view.value] = max(reached, seen.get(view.value, reached))
    return tuple(max(numbers) for numbers in zip(*seen.values(), strict=True))


class _Rows(nn.Module):
    """A function of (..., C) as one of (B, C)."""

    def __init__(self, module: nn.Module, axes: int) -> None:
        super().__init__()
        self.module, self._axes = module, axes

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self._axes):
            x = x[None]
        y = self.module(x)
        for _ in range(self._axes):
            y = y[0]
        return y
