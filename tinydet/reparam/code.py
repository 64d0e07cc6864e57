"""A module's own forward code as a graph, in which a stretch can be replaced.

Only the code of that one module is traced (torch.fx), its children stay what they are: sizes stay
free, and the rest of the network keeps its classes. A module whose code depends on its input's
values or sizes cannot be traced and stays as it is.
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
from tinydet.reparam.replacing import HOOK_TABLES, give_hooks, has_hooks
from tinydet.reparam.same_padding import SamePad2d


class NotTraceableError(ValueError):
    """A module's code does not have the form of a graph; the message says why."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m, module_qualified_name
        return True


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Return a module's code as a graph over its own children and parameters.

    Args:
        module: it is not modified; the graph shares its children and parameters.
        args: positional arguments it was called with: tensors and numbers.
        kwargs: keyword arguments it was called with: none.

    Raises:
        NotTraceableError: the code or the call does not allow it.
    """
    if kwargs or any(type(a) not in (int, float) and not isinstance(a, Tensor) for a in args):
        raise NotTraceableError("it is called with more than tensors and numbers by position")
    parameters = list(inspect.signature(module.forward).parameters.values())
    unused = {p.name: p.default for p in parameters[len(args) :] if p.default is not p.empty}
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise NotTraceableError("it takes any number of arguments")
    tracer = _Tracer()
    try:
        root = _untouched(module)
        graph = tracer.trace(root, concrete_args=unused or None)
    except Exception as error:
        # It is another library's code that runs here: whatever it raises, it is not traceable.
        raise NotTraceableError(
            f"its code is not a plain graph ({type(error).__name__})"
        ) from error
    for node in reversed(graph.nodes):
        if (node.op == "placeholder" and node.name in unused) or _is_guard(node):
            graph.erase_node(node)
    return fx.GraphModule(root, graph, type(module).__name__)


def _untouched(module: nn.Module) -> nn.Module:
    """Return a shallow copy that the module's own code may write to, its caches of tensors empty.

    What it would write while it is traced are stand-ins for tensors; what it has cached would be
    taken for a constant.
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
    """Whether a node only asserts that an argument left out has its default value."""
    return getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none")


class _Labels(fx.Interpreter):
    """Runs a graph and labels each operation with the node it belongs to."""

    def __init__(self, graph: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(graph)
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        self._recorder.label = n
        result = super().run_node(n)
        # Tensors that a node only passes on (an identity) have no operation to their name.
        n.meta["views"] = self._recorder.views(result)
        return result


def observe_nodes(graph: fx.GraphModule, args: tuple[Any, ...]) -> DataFlow:
    """Run a graph once; each `Op.label` of the result is the node that ran it.

    Each node's `meta["views"]` are the tensors it returned, its `meta["ops"]` its operations.
    """
    recorder = Recorder()
    ops: dict[fx.Node, list[Op]] = {node: [] for node in graph.graph.nodes}
    with torch.no_grad(), recorder:
        recorder.flow.inputs = recorder.views(args)
        recorder.flow.returned = _Labels(graph, recorder).run(*args)
        recorder.flow.outputs = recorder.views(recorder.flow.returned)
    for op in recorder.flow.ops:
        ops[op.label].append(op)
    for node, run in ops.items():
        node.meta["ops"] = run
    return recorder.flow


def erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase those of the nodes, the last first, whose result nobody uses, and unused constants."""
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
    """Return a graph as the plainest module: its one child, an `nn.Sequential`, or code of its own.

    What was set on the original as a plain value, and its hooks, are set on it.
    """
    graph.graph.lint()
    chain = _chain(graph)
    new: nn.Module
    if chain is None:
        new = RewrittenModule(graph, graph.graph, type(original).__name__)
    elif has_hooks(original):
        new = nn.Sequential(chain)
    else:
        new = _plainest(list(chain.values())) or nn.Sequential(chain)
    return stand_in(new, original)


def _plainest(layers: list[nn.Module]) -> nn.Module | None:
    """Return the one layer that a chain of layers is, timm's for its padding and a conv."""
    if len(layers) == 2 and isinstance(layers[0], SamePad2d):
        return layers[0].joined(layers[1])
    return layers[0] if len(layers) == 1 else None


def stand_in(new: nn.Module, original: nn.Module) -> nn.Module:
    """Give a module the hooks of another, and the plain values that other code may ask it for."""
    for name, value in vars(original).items():
        if isinstance(value, (bool, int, float, str, tuple)) and not hasattr(new, name):
            new.__dict__[name] = value
    give_hooks(original, new)
    return new.train(original.training)


class RewrittenModule(fx.GraphModule):
    """A module whose forward code was changed.

    torch's own loses its hooks in a copy, and prints what it raises.
    """

    def recompile(self) -> Any:
        """Compile the graph's code, and call it as any module's."""
        code = super().recompile()
        type(self).__call__ = nn.Module.__call__  # Each has a class of its own.
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        return _with_the_rest(super().__deepcopy__(memo), copy.deepcopy(_rest(self), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (*super().__reduce__(), type(self).__name__, _rest(self))


def _restored(
    rebuild: Callable[..., fx.GraphModule],
    arguments: tuple[Any, ...],
    name: str,
    rest: dict[str, Any],
) -> RewrittenModule:
    plain = rebuild(*arguments)
    return _with_the_rest(RewrittenModule(plain, plain.graph, name), rest)


def _rest(module: nn.Module) -> dict[str, Any]:
    """Return what makes up a module beside its code, its children and its tensors."""
    kept = {n: v for n, v in vars(module).items() if n[0] != "_"}
    return {**kept, **{table: vars(module)[table] for table in HOOK_TABLES}}


def _with_the_rest(module: RewrittenModule, rest: dict[str, Any]) -> RewrittenModule:
    module.__dict__.update(rest)
    return module


def _chain(graph: fx.GraphModule) -> OrderedDict[str, nn.Module] | None:
    """Return the modules of a graph that is nothing but one module after another."""
    nodes = list(graph.graph.nodes)
    if nodes[0].op != "placeholder" or nodes[-1].op != "output" or len(nodes) < 3:
        return None
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for before, node in itertools.pairwise(nodes[:-1]):
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return None
        chain[str(node.target).replace(".", "_")] = graph.get_submodule(str(node.target))
    return chain if nodes[-1].args == (nodes[-2],) and len(chain) == len(nodes) - 2 else None
