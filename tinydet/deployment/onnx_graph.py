"""Reading and changing an ONNX graph: who reads what, and the weights of its convolutions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper


@dataclass
class Conv:
    """A convolution whose weights are constants of the graph.

    B images, O output and C input channels, G groups.

    Attributes:
        node: the node.
        weight: (O, C / G, *kernel) float32.
        bias: (O,) float32, or None.
        groups: G.
    """

    node: NodeProto
    weight: np.ndarray
    bias: np.ndarray | None
    groups: int

    def by_group(self) -> np.ndarray:
        """Return the weight as (G, O / G, C / G, taps)."""
        outputs, inputs = self.weight.shape[:2]
        return self.weight.reshape(self.groups, outputs // self.groups, inputs, -1)


def find_convs(model: ModelProto) -> dict[str, Conv]:
    """Return the convolutions with constant weights by the name of their output, in order.

    The arrays are copies; `store_conv` puts them back.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    convs = {}
    for node in model.graph.node:
        names = [name for name in node.input[1:] if name]
        if node.op_type != "Conv" or not all(name in constants for name in names):
            continue
        weight, *bias = (numpy_helper.to_array(constants[name]).copy() for name in names)
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        convs[node.output[0]] = Conv(node, weight, bias[0] if bias else None, groups)
    return convs


def store_conv(model: ModelProto, conv: Conv) -> None:
    """Write a convolution's arrays into the graph, under names of its own.

    A weight that several nodes read is left to the others as it was.
    """
    arrays = [(1, "weight", conv.weight), (2, "bias", conv.bias)]
    for position, kind, array in arrays:
        if array is None:
            continue
        old = conv.node.input[position] if len(conv.node.input) > position else ""
        readers = sum(list(node.input).count(old) for node in model.graph.node) if old else 0
        name = old if readers == 1 else f"{conv.node.output[0]}.{kind}"
        tensors = [tensor for tensor in model.graph.initializer if tensor.name == name]
        tensor = tensors[0] if tensors else model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
        while len(conv.node.input) <= position:
            conv.node.input.append("")
        conv.node.input[position] = name


def find_readers(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Return the nodes that read each value; a graph output is read by a node without a type."""
    readers = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    for output in model.graph.output:
        readers[output.name].append(NodeProto())
    return readers
