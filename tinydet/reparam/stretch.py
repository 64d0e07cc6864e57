"""Stretches of a module's code: nodes between one input and one output, all of them affine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from tinydet.reparam import affine
from tinydet.reparam.code import erase_unused
from tinydet.reparam.dataflow import Op, Value
from tinydet.reparam.linear_region import NotAConvolutionError
from tinydet.reparam.replacing import has_hooks

_NAME = "reparam_conv"  # timm's name for the merged convolution of its own blocks


@dataclass(frozen=True)
class Stretch:
    """Nodes between one input and one output.

    Attributes:
        source: the node whose result is the input.
        nodes: the nodes of the stretch in order; the last gives the output.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def ops(self) -> list[Op]:
        """The operations observed in the nodes."""
        return [op for node in self.nodes for op in node.meta["ops"]]


def stretches(graph: fx.GraphModule, last: fx.Node, data: set[Value]) -> list[Stretch]:
    """Return the affine stretches with parallel branches that end in a node, short ones first."""
    if not _is_affine_node(graph, last, data):
        return []
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    inside, found = {last}, []
    while True:
        frontier = {i for node in inside for i in _varying_inputs(node, data)} - inside
        if len(frontier) == 1:
            stretch = Stretch(next(iter(frontier)), tuple(sorted(inside, key=order.__getitem__)))
            if _is_worth_merging(stretch, data):
                found.append(stretch)
        if not frontier:
            return found
        # In this order each node's users have been met before it: all of them must be inside.
        latest = max(frontier, key=order.__getitem__)
        if not _is_affine_node(graph, latest, data) or not _used_only_in(latest, inside, data):
            return found
        inside.add(latest)


def _is_worth_merging(stretch: Stretch, data: set[Value]) -> bool:
    products = sum(affine.is_product(op) for op in stretch.ops)
    joins = any(len(_varying_inputs(node, data)) > 1 for node in stretch.nodes)
    busy = sum(bool(node.meta["ops"]) for node in stretch.nodes)
    return busy > 1 and (products > 1 or (joins and products == 1))


def _is_affine_node(graph: fx.GraphModule, node: fx.Node, data: set[Value]) -> bool:
    if node.op in ("placeholder", "output") or len(node.meta["views"]) != 1:
        return False
    if not _varies(node, data):
        return False
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if any(has_hooks(m) for m in module.modules()):
            return False
    given = {view.storage for i in node.all_input_nodes for view in i.meta["views"]}
    return all(
        affine.is_affine(op, data) and not writes(op, given)
        for op in node.meta["ops"]
        if any(view.value in data for view in op.inputs)
    )


def writes(op: Op, memory: set[int]) -> bool:
    """Return whether an operation changes some memory in place."""
    mutable = op.func._schema.is_mutable
    return mutable and any(view.storage in memory for view in op.outputs)


def _varies(node: fx.Node, data: set[Value]) -> bool:
    return any(view.value in data for view in node.meta["views"])


def _varying_inputs(node: fx.Node, data: set[Value]) -> set[fx.Node]:
    return {i for i in node.all_input_nodes if _varies(i, data)}


def _used_only_in(node: fx.Node, inside: set[fx.Node], data: set[Value]) -> bool:
    """Whether all that a node's result is used for lies inside, its mere size included."""
    return all(
        user in inside
        or (user.op != "output" and not user.meta["views"] and _used_only_in(user, inside, data))
        for user in node.users
    )


def extracted(graph: fx.GraphModule, stretch: Stretch, data: set[Value]) -> nn.Module:
    """Return a stretch as a module of its own; it shares the graph's weights."""
    new = fx.Graph()
    copies = {stretch.source: new.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node not in stretch.nodes and (_varies(node, data) or node.op == "placeholder"):
                raise NotAConvolutionError("it needs the size of another tensor")
            copies[node] = new.node_copy(node, copied)
        return copies[node]

    new.output(copied(stretch.nodes[-1]))
    return _Stretch(fx.GraphModule(graph, new))


class _Stretch(nn.Module):
    """Runs a graph by its forward alone: called, it would print what it raises."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.graph.forward(x)


def replace(graph: fx.GraphModule, stretch: Stretch, layer: nn.Module) -> None:
    """Put one layer in a stretch's place."""
    last = stretch.nodes[-1]
    name = next(n for n in _names() if not hasattr(graph, n))
    graph.add_submodule(name, layer)
    with graph.graph.inserting_before(last):
        node = graph.graph.call_module(name, (stretch.source,))
    last.replace_all_uses_with(node)
    shapes = [n for n in graph.graph.nodes if not n.meta.get("views", True)]
    erase_unused(graph.graph, sorted({*stretch.nodes, *shapes}, key=list(graph.graph.nodes).index))
    graph.recompile()


def _names() -> Iterator[str]:
    yield _NAME
    for i in range(2, 1000):
        yield f"{_NAME}_{i}"
