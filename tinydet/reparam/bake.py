"""Replace layers whose weights are computed, and norms of any class, by plain torch layers.

A weight that is an expression of parameters and buffers (weight standardization, weight and
spectral norm, masks, any parametrization) has one value in inference. The layer then is a plain
convolution or linear layer, into which norms and factors can be fused. Likewise a batch norm of
any class, or in the code of a block, is a plain one once its statistics are fixed.

What a module computes is read from the operations that it runs, and each replacement is compared
with it on inputs of several sizes. Which layer is taken is decided with random weights, so that it
depends on the architecture alone.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import (
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
)
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tinydet.reparam.affine import is_affine, is_layer, is_product
from tinydet.reparam.apply_changes import Change, Network, RefusedError, apply_changes
from tinydet.reparam.dataflow import DataFlow, Op, Value, observe, storage_of
from tinydet.reparam.fx_graph import (
    NotTraceableError,
    observe_nodes,
    single_call,
    targets,
    trace,
)
from tinydet.reparam.geometry import NotAConvolutionError
from tinydet.reparam.linear_subgraph import (
    LinearSubgraph,
    extract_subgraph,
    replace_subgraph,
    varies,
)
from tinydet.reparam.module_swap import Replacements, has_hooks, hooks_disabled, record_calls
from tinydet.reparam.norms import is_norm, why_not_linear
from tinydet.reparam.plain_layer import SCALES, NotPlainError, plain_layer, right_operand
from tinydet.reparam.report import Step
from tinydet.reparam.rewrite import as_replacement, rewrite
from tinydet.reparam.verify import TOLERANCE, copied, difference

_REMOVALS: dict[type, Any] = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}
_ROOTS = {"aten.rsqrt", "aten.rsqrt_", "aten.sqrt", "aten.sqrt_", "aten.pow", "aten.pow_"}


def bake(network: Network) -> tuple[list[Step], list[Step]]:
    """Replace layers with constant weights, and batch norms of any class, by plain torch layers.

    Args:
        network: changed in place.

    Returns:
        What was replaced, and the layers with computed weights that remain, with the reason.
    """
    left: set[str] = set()

    def find(model: nn.Module, flow: DataFlow, refused: Mapping[str, str]) -> list[Change]:
        left.clear()
        tensors = (*model.parameters(), *model.buffers())
        stored = {storage_of(t) for t in tensors if t.layout is torch.strided}
        targets = list(_targets(model, flow))
        for op in targets:
            if is_product(op) and storage_of(right_operand(op)) not in stored:
                left.add(op.call.name if op.call else op.scope)
        names = dict.fromkeys(op.call.name if op.call else op.scope for op in targets)
        modules = {n: model.get_submodule(n) for n in names if n not in refused}
        with record_calls(list(modules.values())) as records:
            if modules:
                network.examples[0].run(model)
        return [
            *_computed_tensors(model, flow),
            *(
                Change(
                    n,
                    frozenset(m.modules()),
                    partial(_replace, n, m, records.get(m), flow, m is model),
                )
                for n, m in modules.items()
            ),
        ]

    done, refused = apply_changes(network, find)
    return done, [Step(n, f"computed weight stays: {refused.get(n)}") for n in sorted(left)]


def _targets(model: nn.Module, flow: DataFlow) -> Iterator[Op]:
    """Yield the products with constant weights, and the norms, that are no plain layer's."""
    data = flow.depends_on_input()
    rooted = {op.scope for op in flow.ops if op.name in _ROOTS and not op.varying(data)}
    for op in flow.ops:
        module = op.call.module if op.call else None
        if isinstance(module, nn.RNNBase) or op.in_autocast:
            continue  # The same weights in each step; casts that would be lost.
        if _is_product_of_constants(op, flow, data):
            if not _is_own(op, model.get_submodule(op.scope)):
                yield op
        elif is_affine(op, data) and len(op.varying(data)) == 1:
            norm = op.name == "aten.native_batch_norm"
            scale = op.name in SCALES and op.scope in rooted
            if (norm or scale) and (module is None or why_not_linear(module)):
                yield op


def _is_product_of_constants(op: Op, flow: DataFlow, data: set[Value]) -> bool:
    """Return whether an operation multiplies an activation from the right by constant weights."""
    if not is_layer(op, data) or not op.inputs or _is_varying(right_operand(op), op, data):
        return False
    # Weights that are mixed for each image, as in CondConv, are best left where they are.
    made = op.outputs[0].value
    readers = [o for o in flow.readers(made) if o.name == "aten.convolution"]
    return all(o.inputs[0].value == made for o in readers)


def _is_varying(tensor: Tensor, op: Op, data: set[Value]) -> bool:
    return storage_of(tensor) in {view.storage for view in op.varying(data)}


def _is_own(op: Op, module: nn.Module) -> bool:
    """Return whether a product is that of a layer with its own weight."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    layer = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return layer and weight is not None and storage_of(weight) == storage_of(right_operand(op))


def _computed_tensors(model: nn.Module, flow: DataFlow) -> list[Change]:
    """Return the removals of torch's parametrizations, weight norms and pruning masks."""
    return [
        Change(
            f"weights of {name or 'the network'}",
            frozenset([module]),
            partial(_store, name, module, flow),
        )
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module) or any(map(_computes, _pre_hooks(module)))
    ]


def _pre_hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _computes(hook: Any) -> bool:
    return isinstance(hook, (WeightNorm, SpectralNorm, prune.BasePruningMethod))


def _store(name: str, module: nn.Module, flow: DataFlow) -> tuple[str, Replacements]:
    """Make the computed tensors of one module plain parameters (a `Change.make`)."""
    _refuse_shared(flow, name, module.parameters())
    kind = parametrize.type_before_parametrizations(module)
    if parametrize.is_parametrized(module):
        computed = {
            n: (getattr(module, n), p) for n, p in cast(Any, module.parametrizations).items()
        }
        # torch's own removal changes the class, which copies of the module share.
        module.__class__ = kind
        del module.parametrizations
        for tensor_name, (value, parametrization) in computed.items():
            value, sources = value.detach().clone(), list(parametrization.parameters())
            if sources:
                value = nn.Parameter(value, any(p.requires_grad for p in sources))
                module.register_parameter(tensor_name, value)
            else:
                module.register_buffer(tensor_name, value)
    for hook in filter(_computes, _pre_hooks(module)):
        masks = isinstance(hook, prune.BasePruningMethod)
        tensor_name = hook._tensor_name if masks else hook.name
        sources = [p for n, p in module.named_parameters() if n.startswith(f"{tensor_name}_")]
        remove = prune.remove if masks else _REMOVALS[type(hook)]
        remove(module, tensor_name)
        getattr(module, tensor_name).requires_grad_(any(p.requires_grad for p in sources))
    loading: dict[int, Any] = dict(module._load_state_dict_pre_hooks)
    for key, hook in loading.items():
        if hook.hook.__module__.startswith("torch.nn.utils."):
            # They look for the tensors that are gone, and cannot be pickled.
            del module._load_state_dict_pre_hooks[key]
    return f"the computed weights of this {kind.__name__} are stored", {}


def _refuse_shared(flow: DataFlow, name: str, weights: Iterable[Tensor]) -> None:
    inside, outside = f"{name}." if name else "", name.rpartition(".")[0]
    data = flow.depends_on_input()
    for weight in weights:
        for op in flow.users(weight):
            # A pre-hook that computes a weight from others runs before its module.
            in_hook = op.scope == outside and not op.varying(data)
            if op.scope != name and not op.scope.startswith(inside) and not in_hook:
                raise RefusedError(f"its weights are also used in {op.scope or 'the network'}")


def _replace(
    name: str,
    module: nn.Module,
    record: tuple[Any, Any, Any] | None,
    flow: DataFlow,
    keep: bool,
) -> tuple[str, Replacements]:
    """Replace one module, or layers in its code, by plain layers (a `Change.make`)."""
    kind = type(module).__name__
    if record is None:
        raise RefusedError("its code does not run as a module's call")
    args, kwargs, output = record
    try:
        try:
            layer = _whole(module, args, kwargs)
        except NotPlainError as reason:
            graph = _with_plain_layers(module, args, kwargs, str(reason))
            _check(flow, name, module, _used(graph), output, observe_nodes(graph).returned)
            new = rewrite(module, graph, keep)
        else:
            _check(flow, name, module, list(layer.parameters()), output, layer(*copied(args)))
            new = (
                rewrite(module, single_call(module, args, layer), keep=True)
                if keep
                else as_replacement(layer, module)
            )
    except (NotTraceableError, NotPlainError) as error:
        raise RefusedError(str(error)) from error
    if "weight" in vars(module):
        new._forward_pre_hooks = OrderedDict()  # They computed the weight.
    return f"{kind} is now a plain {type(new).__name__}", {module: new} if new is not module else {}


def _check(
    flow: DataFlow, name: str, module: nn.Module, used: list[Tensor], output: Any, found: Any
) -> None:
    """Refuse to replace a module whose weights others use, or by one that differs."""
    _refuse_shared(flow, name, {*module.parameters()} - {*used})
    apart = difference(output, found).max_rel
    if not apart <= TOLERANCE:
        raise RefusedError(f"as plain layers it differs by {apart:.1e} of its output")


def _used(graph: fx.GraphModule) -> list[Tensor]:
    """Return the parameters that a graph uses."""
    names = tuple(targets(graph))
    within = tuple(f"{name}." for name in names)
    return [p for n, p in graph.named_parameters() if n in names or n.startswith(within)]


def _whole(module: nn.Module, args: Any, kwargs: Any) -> nn.Module:
    """Return the plain layer that is equivalent to a module, and the modules that run after it.

    Raises:
        NotPlainError: there is none.
    """
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        raise NotPlainError("it takes more than one tensor")
    if any(has_hooks(child) for child in module.modules() if child is not module):
        raise NotPlainError("a module inside has a forward hook")
    with hooks_disabled(module):
        flow = observe(module, copied(args), is_leaf=lambda m: m is not module)
        if sum(is_product(op) for op in flow.ops if op.varying(flow.depends_on_input())) > 1:
            raise NotPlainError("it runs more than one layer")
        first, made = copy.deepcopy(module), flow.outputs
        rest: list[nn.Module] = []
        for call in reversed(flow.calls if next(module.children(), None) else []):
            if call.outputs != made:
                break
            first.set_submodule(call.name, nn.Identity())
            rest, made = [call.module, *rest], call.inputs
        layer = plain_layer(first, args[0].shape)
    rest = [m for m in rest if type(m) is not nn.Identity]
    return nn.Sequential(layer, *rest) if rest else layer


def _with_plain_layers(module: nn.Module, args: Any, kwargs: Any, reason: str) -> fx.GraphModule:
    """Return a module's code with calls of plain layers.

    Raises:
        NotTraceableError: its code cannot be traced.
        NotPlainError: nothing was replaced, for this reason or another one.
    """
    if is_norm(module):
        raise NotPlainError(reason)
    graph = trace(module, args, kwargs)
    tried: set[fx.Node] = set()
    baked: list[nn.Module] = []
    while (code := _replace_node(graph, tried)) is not None:
        baked.append(code)
    if not baked:
        raise NotPlainError(reason)
    weights = [*_used(graph), *(p for part in baked for p in part.parameters())]
    if len({*map(id, weights)}) < len(weights):
        raise NotPlainError("its weights are used more than once")
    return graph


def _replace_node(graph: fx.GraphModule, tried: set[fx.Node]) -> nn.Module | None:
    """Replace one node of a graph by a plain layer, and return the replaced code."""
    flow = observe_nodes(graph)
    data = flow.depends_on_input()
    for node in graph.graph.nodes:
        if node in tried or node.op not in ("call_function", "call_method"):
            continue
        tried.add(node)
        if not any(
            _is_product_of_constants(op, flow, data) or _is_norm(op, data)
            for op in node.meta["ops"]
        ):
            continue
        for nodes in ([node, *_bias_added(node)], [node]):
            given = {i for n in nodes for i in n.all_input_nodes if varies(i, data)} - {*nodes}
            if len(given) != 1:
                continue
            found = LinearSubgraph(given.pop(), tuple(nodes))
            (source,) = found.source.meta["views"]
            try:
                code = extract_subgraph(graph, found, data)
                layer = plain_layer(code, source.shape)
            except (NotPlainError, NotAConvolutionError):
                continue
            replace_subgraph(graph, found, layer)
            return code
    return None


def _bias_added(node: fx.Node) -> list[fx.Node]:
    """Return the addition that alone uses a node's result."""
    users = list(node.users)
    ops = [op.name for op in users[0].meta["ops"] if not op.is_view] if len(users) == 1 else []
    return users if ops in (["aten.add"], ["aten.add_"]) else []


def _is_norm(op: Op, data: set[Value]) -> bool:
    """Return whether an operation is a batch norm with fixed statistics."""
    return op.name == "aten.native_batch_norm" and is_affine(op, data) and bool(op.varying(data))
