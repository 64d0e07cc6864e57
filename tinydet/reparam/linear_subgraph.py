"""Linear subgraphs of a module's code: affine nodes between one input and one output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from tinydet.reparam import affine
from tinydet.reparam.dataflow import DataFlow, Op, Value
from tinydet.reparam.fx_graph import add_layer, erase
from tinydet.reparam.geometry import NotAConvolutionError
from tinydet.reparam.module_swap import has_hooks


@dataclass(frozen=True)
class LinearSubgraph:
    """Affine nodes between one input and one output.

    Attributes:
        source: the node whose result is the input.
        nodes: the nodes of the subgraph in order; the last one's result is the output.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def ops(self) -> list[Op]:
        """The operations observed in the nodes."""
        return [op for node in self.nodes for op in node.meta["ops"]]


def linear_subgraphs(
    graph: fx.GraphModule, last: fx.Node, flow: DataFlow, data: set[Value]
) -> list[LinearSubgraph]:
    """Return the linear subgraphs worth merging that end in a node, small ones first.

    Args:
        graph: the module, as `observe_nodes` ran it.
        last: the node.
        flow: the data flow observed then.
        data: values that depend on the input.
    """
    if not _is_affine_node(graph, last, flow, data):
        return []
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    inside, found = {last}, []
    while True:
        frontier = {i for node in inside for i in _varying_inputs(node, data)} - inside
        if len(frontier) == 1:
            subgraph = LinearSubgraph(
                next(iter(frontier)), tuple(sorted(inside, key=order.__getitem__))
            )
            if _is_worth_merging(subgraph, data):
                found.append(subgraph)
        if not frontier:
            return found
        # Visited in this order, all users of a node come before it; they must be inside.
        latest = max(frontier, key=order.__getitem__)
        affine_node = _is_affine_node(graph, latest, flow, data)
        if not affine_node or not _used_only_in(latest, inside, data):
            return found
        inside.add(latest)


def _is_worth_merging(subgraph: LinearSubgraph, data: set[Value]) -> bool:
    products = sum(affine.is_product(op) for op in subgraph.ops)
    joins = any(len(_varying_inputs(node, data)) > 1 for node in subgraph.nodes)
    busy = sum(bool(node.meta["ops"]) for node in subgraph.nodes)
    if not subgraph.source.meta["is_tensor"] or _writes_outside(subgraph):
        return False
    return busy > 1 and (products > 1 or (joins and products == 1))


def _writes_outside(subgraph: LinearSubgraph) -> bool:
    """Whether the subgraph changes memory that it did not create."""
    given = {i for node in subgraph.nodes for i in node.all_input_nodes} - {*subgraph.nodes}
    outside = {view.storage for node in given for view in node.meta["views"]}
    return any(writes(op, outside) for op in subgraph.ops)


def _is_affine_node(graph: fx.GraphModule, node: fx.Node, flow: DataFlow, data: set[Value]) -> bool:
    if node.op in ("placeholder", "output") or len(node.meta["views"]) != 1:
        return False
    if not varies(node, data):
        return False
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if any(has_hooks(m) for m in module.modules()):
            return False
    varying = [op for op in node.meta["ops"] if op.varying(data)]
    return all(affine.is_affine(op, data) or affine.sums_a_stack(op, flow) for op in varying)


def writes(op: Op, memory: set[int]) -> bool:
    """Return whether an operation changes some memory in place."""
    return op.mutates and any(view.storage in memory for view in op.outputs)


def varies(node: fx.Node, data: set[Value]) -> bool:
    """Return whether a node's result depends on the input."""
    return any(view.value in data for view in node.meta["views"])


def _varying_inputs(node: fx.Node, data: set[Value]) -> set[fx.Node]:
    return {i for i in node.all_input_nodes if varies(i, data)}


def _used_only_in(node: fx.Node, inside: set[fx.Node], data: set[Value]) -> bool:
    """Whether all uses of a node's result lie inside, also those of its size."""
    return all(
        user in inside
        or (user.op != "output" and not user.meta["views"] and _used_only_in(user, inside, data))
        for user in node.users
    )


def extract_subgraph(
    graph: fx.GraphModule, subgraph: LinearSubgraph, data: set[Value]
) -> nn.Module:
    """Return a subgraph as a separate module that shares the graph's weights."""
    new = fx.Graph()
    copies = {subgraph.source: new.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node not in subgraph.nodes and (varies(node, data) or node.op == "placeholder"):
                raise NotAConvolutionError("it needs the size of another tensor")
            copies[node] = new.node_copy(node, copied)
        return copies[node]

    for node in subgraph.nodes:  # In this order, as some may work in place.
        copied(node)
    new.output(copied(subgraph.nodes[-1]))
    return _Subgraph(fx.GraphModule(graph, new))


class _Subgraph(nn.Module):
    """Runs a graph by its `forward`: `GraphModule.__call__` prints the errors it raises."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.graph.forward(x)


def replace_subgraph(graph: fx.GraphModule, subgraph: LinearSubgraph, layer: nn.Module) -> None:
    """Replace a subgraph by one layer."""
    last = subgraph.nodes[-1]
    name = add_layer(graph, layer)
    with graph.graph.inserting_before(last):
        node = graph.graph.call_module(name, (subgraph.source,))
    last.replace_all_uses_with(node)
    erase(graph, subgraph.nodes)
