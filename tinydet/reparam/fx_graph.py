"""A module's own forward code as a torch.fx graph that can be edited.

Only the code of that one module is traced; its children are leaves. So input sizes stay free, and
the rest of the network keeps its code. Checks that raise stay in the graph. A module whose code
depends on its input's values or sizes in another way cannot be traced and is left unchanged.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tinydet.reparam.dataflow import DataFlow, Op, Recorder
from tinydet.reparam.tracer import NotTraceableError, Tracer
from tinydet.reparam.verify import copied

_NAME = "reparam_conv"  # timm's name for the merged convolution of its own blocks


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Return a module's code as a graph over its own children, parameters and buffers.

    Arguments that are None, a bool or a string, and numbers that were omitted, are constants in
    the graph, which raises an error for other values.

    Args:
        module: it is not modified; the graph shares its children and parameters.
        args: positional arguments it was called with.
        kwargs: keyword arguments it was called with.

    Returns:
        The graph. Its `meta` has the arguments for its placeholders, and what `rewrite` needs.

    Raises:
        NotTraceableError: the code cannot be traced.
    """
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        raise NotTraceableError("its code is TorchScript, or not that of its class")
    if isinstance(module, fx.GraphModule):
        raise NotTraceableError("it is a torch.fx graph; fold the network before it is traced")
    problem: Exception | None = None
    # Lists that cannot be traced as one argument are taken apart.
    for unpack in (False, True):
        tracer, root = Tracer(args, kwargs, unpack), _traceable_copy(module)
        try:
            with torch.enable_grad():  # So that the code's own contexts can be told.
                traced = tracer.trace(root)
            break
        except Exception as error:
            # This runs code of any library, which may raise anything when it is not traceable.
            problem = problem or error
    else:
        raise NotTraceableError(
            f"its code is not a plain graph ({type(problem).__name__})"
        ) from problem
    root.training = module.training
    if any(isinstance(value, fx.Proxy) for value in vars(root).values()):
        raise NotTraceableError("it stores activations in its attributes")
    for node in reversed(traced.nodes):
        if (node.target is getattr or node.op == "get_attr") and not node.users:
            traced.erase_node(node)
    return _graph_module(module, tracer, traced)


def single_call(module: nn.Module, args: tuple[Any, ...], layer: nn.Module) -> fx.GraphModule:
    """Return the graph that only calls a layer, in place of all that a module does.

    Args:
        module: as in `trace`, but its code need not be traceable.
        args: positional arguments it was called with; the first is the layer's input.
        layer: the layer.
    """
    tracer = Tracer(args, {}, unpack=False)
    tracer.root, tracer.graph = _traceable_copy(module), fx.Graph()
    tracer.create_args_for_root(type(module).forward, is_module=True)
    tracer.root.training = module.training
    source = next(iter(tracer.graph.nodes))
    output = tracer.graph.output(source)
    graph = _graph_module(module, tracer, tracer.graph)
    graph.meta["targets"] = {*module._modules, *module._parameters, *module._buffers}
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_module(add_layer(graph, layer), (source,)),)
    return graph


def add_layer(graph: fx.GraphModule, layer: nn.Module) -> str:
    """Add a layer to a graph's modules; return its name, which its module does not use yet."""
    numbered = (f"{_NAME}_{i}" for i in itertools.count(2))
    name = next(
        n
        for n in itertools.chain([_NAME], numbered)
        if all(getattr(m, n, None) is None for m in (graph, graph.meta["module"]))
    )
    graph.add_submodule(name, layer)
    return name


def _graph_module(module: nn.Module, tracer: Tracer, graph: fx.Graph) -> fx.GraphModule:
    made = fx.GraphModule(tracer.root, graph, type(module).__name__)
    made.meta.update(
        module=module,
        inputs=tuple(tracer.inputs),
        mode=next(iter(tracer.modes)) if len(tracer.modes) == 1 else (False, True),
        effects={node for node in graph.nodes if not node.users},
        nodes={node: node.meta.get("methods", set()) for node in graph.nodes},
        targets=targets(made),
    )
    return made


def targets(graph: fx.GraphModule) -> set[str]:
    """Return the qualified names of the modules and tensors that a graph uses."""
    used = {str(n.target) for n in graph.graph.nodes if n.op in ("call_module", "get_attr")}
    return used - {"training"}


def _traceable_copy(module: nn.Module) -> nn.Module:
    """Return a shallow copy with empty tensor caches, which the module's code may write to.

    While tracing, the code would write fx proxies into its caches, and read cached tensors as
    constants.
    """
    twin = cast(nn.Module, object.__new__(type(module)))
    for name, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            cached = name[0] != "_" and isinstance(value, dict) and _are_tensors(value.values())
            value = {} if cached else copy.copy(value)
        twin.__dict__[name] = value
    return twin


def _are_tensors(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


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
        n.meta["is_tensor"] = isinstance(result, Tensor)
        return result


def observe_nodes(graph: fx.GraphModule) -> DataFlow:
    """Run a graph once and record it; each `Op.label` is the node that ran the operation.

    Sets `meta["views"]` of each node to the tensors it returned, `meta["is_tensor"]` to whether it
    returned one, and `meta["ops"]` to its operations.

    Args:
        graph: the result of `trace`, which runs on copies of the arguments given there.

    Raises:
        NotTraceableError: the graph does not run.
    """
    recorder = Recorder()
    args = copied(graph.meta["inputs"])
    ops: dict[fx.Node, list[Op]] = {node: [] for node in graph.graph.nodes}
    try:
        with torch.no_grad(), recorder:
            recorder.flow.inputs = recorder.views(args)
            recorder.flow.returned = _LabelingInterpreter(graph, recorder).run(*args)
            recorder.flow.outputs = recorder.views(recorder.flow.returned)
    except Exception as error:
        raise NotTraceableError(f"traced, it does not run ({type(error).__name__})") from error
    for op in recorder.flow.ops:
        ops[op.label].append(op)
    for node, run in ops.items():
        node.meta["ops"] = run
    return recorder.flow


def erase(graph: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Erase nodes, what reads them (checks of their sizes), and what is unused without them."""
    doomed = set(nodes)
    for node in graph.graph.nodes:
        if doomed.intersection(node.all_input_nodes):
            doomed.add(node)
    for node in reversed(graph.graph.nodes):
        unused = not node.users and node.op not in ("placeholder", "output")
        if unused and (node in doomed or node not in graph.meta["effects"]):
            graph.graph.erase_node(node)
