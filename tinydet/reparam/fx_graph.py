"""A module's own forward code as a torch.fx graph that can be edited.

Only the code of that one module is traced; its children are leaves. So input sizes stay free, and
the rest of the network keeps its classes. A module whose code depends on its input's values or
sizes cannot be traced and is left unchanged.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tinydet.reparam.dataflow import DataFlow, Op, Recorder
from tinydet.reparam.module_swap import HOOK_TABLES, give_hooks, has_hooks
from tinydet.reparam.same_padding import SamePad2d


class NotTraceableError(ValueError):
    """A module's code cannot be traced; the message says why."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m, module_qualified_name
        return True


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Return a module's code as a graph over its own children and parameters.

    Args:
        module: it is not modified; the graph shares its children and parameters.
        args: positional arguments it was called with; only tensors and numbers can be traced.
        kwargs: keyword arguments it was called with; must be empty.

    Raises:
        NotTraceableError: the code or the call cannot be traced.
    """
    if kwargs or any(type(a) not in (int, float) and not isinstance(a, Tensor) for a in args):
        raise NotTraceableError("it is called with more than tensors and numbers by position")
    parameters = list(inspect.signature(module.forward).parameters.values())
    unused = {p.name: p.default for p in parameters[len(args) :] if p.default is not p.empty}
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise NotTraceableError("it takes any number of arguments")
    tracer = _Tracer()
    try:
        root = _traceable_copy(module)
        graph = tracer.trace(root, concrete_args=unused or None)
    except Exception as error:
        # This runs code of any library, which may raise anything when it is not traceable.
        raise NotTraceableError(
            f"its code is not a plain graph ({type(error).__name__})"
        ) from error
    for node in reversed(graph.nodes):
        if (node.op == "placeholder" and node.name in unused) or _is_guard(node):
            graph.erase_node(node)
    return fx.GraphModule(root, graph, type(module).__name__)


def _traceable_copy(module: nn.Module) -> nn.Module:
    """Return a shallow copy with empty tensor caches, which the module's code may write to.

    While tracing, the code would write fx proxies into its caches, and read cached tensors as
    constants.
    """
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            cached = name[0] != "_" and isinstance(value, dict) and _are_tensors(value.values())
            twin.__dict__[name] = {} if cached else copy.copy(value)
    return twin


def _are_tensors(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _is_guard(node: fx.Node) -> bool:
    """Whether a node only asserts that an omitted argument has its default value."""
    return getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none")


class _LabelingInterpreter(fx.Interpreter):
    """Runs a graph and labels each operation with its node."""

    def __init__(self, graph: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(graph)
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        self._recorder.label = n
        result = super().run_node(n)
        # A node that only passes tensors on (an identity) runs no operation.
        n.meta["views"] = self._recorder.views(result)
        return result


def observe_nodes(graph: fx.GraphModule, args: tuple[Any, ...]) -> DataFlow:
    """Run a graph once and record it; each `Op.label` is the node that ran the operation.

    Sets `meta["views"]` of each node to the tensors it returned and `meta["ops"]` to its
    operations.
    """
    recorder = Recorder()
    ops: dict[fx.Node, list[Op]] = {node: [] for node in graph.graph.nodes}
    with torch.no_grad(), recorder:
        recorder.flow.inputs = recorder.views(args)
        recorder.flow.returned = _LabelingInterpreter(graph, recorder).run(*args)
        recorder.flow.outputs = recorder.views(recorder.flow.returned)
    for op in recorder.flow.ops:
        ops[op.label].append(op)
    for node, run in ops.items():
        node.meta["ops"] = run
    return recorder.flow


def erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase those of the given nodes whose results are unused, then all unused constants."""
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)
    changed = True
    while changed:
        changed = False
        for node in reversed(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
                changed = True


def as_module(graph: fx.GraphModule, original: nn.Module) -> nn.Module:
    """Return a graph as a module: its only child, an `nn.Sequential`, or a `RewrittenModule`.

    The result gets the hooks and the plain attributes of the original.
    """
    graph.graph.lint()
    chain = _chain(graph)
    new: nn.Module
    if chain is None:
        new = RewrittenModule(graph, graph.graph, type(original).__name__)
    elif has_hooks(original):
        new = nn.Sequential(chain)
    else:
        new = _single_layer(list(chain.values())) or nn.Sequential(chain)
    return as_replacement(new, original)


def _single_layer(layers: list[nn.Module]) -> nn.Module | None:
    """Return the one layer of a chain, or timm's Conv2dSame for its padding and a conv."""
    if len(layers) == 2 and isinstance(layers[0], SamePad2d):
        return layers[0].joined(layers[1])
    return layers[0] if len(layers) == 1 else None


def as_replacement(new: nn.Module, original: nn.Module) -> nn.Module:
    """Copy the hooks, mode and plain attributes of the original, which other code may read."""
    for name, value in vars(original).items():
        if isinstance(value, (bool, int, float, str, tuple)) and not hasattr(new, name):
            new.__dict__[name] = value
    give_hooks(original, new)
    return new.train(original.training)


class RewrittenModule(fx.GraphModule):
    """A module with edited forward code.

    Unlike `fx.GraphModule` it keeps its hooks in copies and pickles, and does not print the errors
    that it raises.
    """

    def recompile(self) -> Any:
        """Compile the graph's code, and restore the ordinary module call."""
        code = super().recompile()
        setattr(type(self), "__call__", nn.Module.__call__)  # noqa: B010 - its class is its own.
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        twin = super().__deepcopy__(memo)
        twin.__dict__.update(copy.deepcopy(_rest(self), memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (*super().__reduce__(), type(self).__name__, _rest(self))


def _restored(
    rebuild: Callable[..., fx.GraphModule],
    arguments: tuple[Any, ...],
    name: str,
    rest: dict[str, Any],
) -> RewrittenModule:
    plain = rebuild(*arguments)
    module = RewrittenModule(plain, plain.graph, name)
    module.__dict__.update(rest)
    return module


def _rest(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes and hooks: all but its code, children and tensors."""
    kept = {n: v for n, v in vars(module).items() if n[0] != "_"}
    return {**kept, **{table: vars(module)[table] for table in HOOK_TABLES}}


def _chain(graph: fx.GraphModule) -> OrderedDict[str, nn.Module] | None:
    """Return the modules of a graph that only calls one module after another, else None."""
    nodes = list(graph.graph.nodes)
    if nodes[0].op != "placeholder" or nodes[-1].op != "output" or len(nodes) < 3:
        return None
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for before, node in itertools.pairwise(nodes[:-1]):
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return None
        chain[str(node.target).replace(".", "_")] = graph.get_submodule(str(node.target))
    return chain if nodes[-1].args == (nodes[-2],) and len(chain) == len(nodes) - 2 else None
