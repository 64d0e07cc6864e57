"""Find, count and remove multiplications by constants in the code of modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tinydet.reparam.affine import is_affine, is_layer
from tinydet.reparam.apply_changes import Change, RefusedError
from tinydet.reparam.channel_affine import ChannelAffine, NotFusableError, OtherAxisError
from tinydet.reparam.channelwise_ops import FACTORS, SUMS
from tinydet.reparam.dataflow import Call, DataFlow, Op, Value, named, storage_of
from tinydet.reparam.examples import Example
from tinydet.reparam.fuse_affine import Fusion, apply_fusions, one_per_layer, producer_fusions
from tinydet.reparam.fx_graph import NotTraceableError, erase, observe_nodes, trace
from tinydet.reparam.module_swap import Replacements, has_hooks, record_calls
from tinydet.reparam.norms import is_norm
from tinydet.reparam.rewrite import rewrite


def only_scales(call: Call, data: set[Value]) -> bool:
    """Return whether a call only multiplies by constants and adds constants."""
    if call.arguments != 1 or len(call.outputs) != 1 or has_hooks(call.module):
        return False
    shapes = [view.shape for view in (*call.inputs, *call.outputs)]
    if len(shapes) != 2 or shapes[0] != shapes[1] or call.inputs[0].value not in data:
        return False
    work = [op for op in call.ops if not op.is_view and op.varying(data)]
    elementwise = all(
        op.name in (*FACTORS, *SUMS) and len(op.varying(data)) == 1 and is_affine(op, data)
        for op in work
    )
    return elementwise and any(op.name in FACTORS for op in work)


def find_factors(
    model: nn.Module,
    example: Example,
    flow: DataFlow,
    refused: Mapping[str, str],
    kept: dict[str, str],
    untraceable: dict[nn.Module, str],
) -> list[Change]:
    """Find multiplications by constants in the code of modules that can be fused into layers.

    Args:
        model: the network.
        example: the inputs of a forward pass.
        flow: the data flow observed in it.
        refused: names of the changes that were refused, with the reasons.
        kept: gets the names of the factors that cannot be fused, with the reasons.
        untraceable: modules whose code is known not to be traceable, with the reasons; gets more.
    """
    data = flow.depends_on_input()
    found: list[tuple[str, nn.Module, Op, list[Fusion]]] = []
    for name, op in _named_factors(flow).items():
        if name in refused or (op.call is not None and only_scales(op.call, data)):
            continue
        (view,) = op.varying(data)
        try:
            fusions = one_per_layer(
                flow, producer_fusions(flow, view, {op}, _affine_of_factor(op, data))
            )
        except NotFusableError as reason:
            kept[name] = str(reason)
            continue
        found.append((name, model.get_submodule(op.scope), op, fusions))
    if not found:
        return []
    with record_calls([module for _, module, _, _ in found]) as records:
        example.run(model)

    def change(name: str, module: nn.Module, op: Op, fusions: list[Fusion]) -> Change:
        def make() -> tuple[str, Replacements]:
            try:
                # To trace a detector's code may take as long as to run it.
                if module in untraceable:
                    raise NotTraceableError(untraceable[module])
                graph = _without_factor(module, records.get(module), flow, op)
                new = rewrite(module, graph, keep=module is model)
            except NotTraceableError as error:
                if error.__cause__ is not None:  # Raised by the code, not for this factor alone.
                    untraceable[module] = str(error)
                raise RefusedError(f"the code that multiplies stays: {error}") from error
            return apply_fusions(fusions), {module: new} if new is not module else {}

        return Change(name, frozenset((module, *(a.call.module for a in fusions))), make)

    return [change(*one) for one in found]


def _named_factors(flow: DataFlow) -> dict[str, Op]:
    """Return the multiplications by constants outside of norms, with unique names."""
    data = flow.depends_on_input()
    return named(
        op
        for op in flow.ops
        if op.name in FACTORS
        and is_factor(op, data)
        and not (op.call is not None and is_norm(op.call.module))
    )


def is_factor(op: Op, data: set[Value]) -> bool:
    """Return whether an operation multiplies or divides an activation by a constant."""
    varying = op.varying(data)
    return len(varying) == 1 and is_affine(op, data) and varying[0].shape == op.outputs[0].shape


def _affine_of_factor(op: Op, data: set[Value]) -> ChannelAffine:
    (view,) = op.varying(data)
    other = next(
        a for a in op.args[:2]
        if not isinstance(a, Tensor) or storage_of(a) != view.storage
    )  # fmt: skip
    tensors = [t for t in op.args[:2] if isinstance(t, Tensor)]
    factor = torch.as_tensor(other, dtype=tensors[0].dtype)
    if "div" in op.name:
        factor = 1.0 / factor
    return ChannelAffine.of(factor.view([1] * (len(view.shape) - factor.ndim) + [*factor.shape]))


def _without_factor(
    module: nn.Module, record: tuple[Any, Any, Any] | None, flow: DataFlow, op: Op
) -> fx.GraphModule:
    """Return a module's code without the multiplication by a factor.

    Raises:
        NotTraceableError: its code cannot be traced, or the factor is not found in the graph.
    """
    if record is None:
        raise NotTraceableError("its code is TorchScript, or does not run as a module's call")
    args, kwargs, _ = record
    graph = trace(module, args, kwargs)
    data = observe_nodes(graph).depends_on_input()
    # The traced code may compute constants again; operations on activations must be the same.
    varying = flow.depends_on_input()
    own = [o for o in flow.ops if o.scope == op.scope and o.varying(varying)]
    traced = [
        (node, o)
        for node in graph.graph.nodes
        if node.op in ("call_function", "call_method")
        for o in node.meta["ops"]
        if o.varying(data)
    ]
    if [o.name for o in own] != [o.name for _, o in traced]:
        raise NotTraceableError("its code runs other operations when traced")
    node = traced[own.index(op)][0]
    source = _only_multiplies(node, data)
    node.replace_all_uses_with(source)
    erase(graph, [node])
    return graph


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


def scales(flow: DataFlow) -> dict[str, str]:
    """Return the multiplications of a layer's output by a constant for each channel.

    A norm, a view or another factor may come in between, another reader of the output may not.

    Returns:
        For the name of each multiplication, the name of the change that would remove it.
    """
    data = flow.depends_on_input()
    return {
        name: op.call.name if op.call is not None and only_scales(op.call, data) else name
        for name, op in _named_factors(flow).items()
        if len(op.inputs) == 2 and _follows_a_layer(flow, op, data) and _is_of_channels(flow, op)
    }


def _is_of_channels(flow: DataFlow, op: Op) -> bool:
    """Whether a factor is one number for each channel of the layer before it, not of each token."""
    data = flow.depends_on_input()
    try:
        producer_fusions(flow, op.varying(data)[0], {op}, _affine_of_factor(op, data))
    except OtherAxisError:
        return False
    except NotFusableError:
        pass
    return True


def count_scales(flow: DataFlow) -> int:
    """Count the multiplications of a layer's output by a constant for each channel."""
    return len(scales(flow))


def _follows_a_layer(flow: DataFlow, op: Op, data: set[Value]) -> bool:
    while True:
        (view,) = op.varying(data)
        made = flow.producer(view.value)
        if made is None or len(flow.readers(view.value)) > 1 or flow.is_returned(view.value):
            return False
        if is_layer(made, data):
            return True
        alone = len(made.varying(data)) == 1
        if not alone or made.name not in (*FACTORS, *SUMS, "aten.native_batch_norm", "aten.clone"):
            return False
        op = made
