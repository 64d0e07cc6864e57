"""Read, change and observe an ONNX graph: its convolutions, its values and who reads them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper
from torch import Tensor

from tinydet.deployment.onnx_detector import open_session
from tinydet.progress import Progress


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


@dataclass
class ChannelStats:
    """Statistics of a value (B, C, *spatial) over images and positions.

    Attributes:
        largest: (C,) largest magnitude.
        mean: (C,).
    """

    largest: np.ndarray
    mean: np.ndarray


def find_convs(model: ModelProto) -> dict[str, Conv]:
    """Return the convolutions with constant weights by the name of their output, in order.

    The arrays are copies; `store_conv` writes them back.
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
    """Write a convolution's arrays into the graph.

    A weight that several nodes share is not changed for the others: the convolution gets its own.
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
    """Return the nodes that read each value; a graph output has a reader without a type."""
    readers = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    for output in model.graph.output:
        readers[output.name].append(NodeProto())
    return readers


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy that also returns the named inner values, which must be of type float."""
    copy = ModelProto()
    copy.CopyFrom(model)
    existing = {output.name for output in copy.graph.output}
    for name in names:
        if name not in existing:
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            copy.graph.output.append(value)
    return copy


def channel_stats(
    model: ModelProto, names: Sequence[str], batches: Iterable[Tensor]
) -> dict[str, ChannelStats]:
    """Run a network and return the statistics of some of its values.

    Args:
        model: with one input.
        names: of float values (B, C, *spatial).
        batches: the inputs, at least one.

    Raises:
        ValueError: ONNX Runtime is missing or rejects the network, or there is no input.
    """
    names = list(dict.fromkeys(names))
    session = open_session(with_outputs(model, names))
    (given,) = session.get_inputs()
    largest: dict[str, np.ndarray] = {}
    total: dict[str, Any] = {}
    count: dict[str, int] = {}
    with Progress("measuring activations", 0, "batches") as progress:
        for images in batches:
            values = session.run(names, {given.name: images.numpy()})
            for name, value in zip(names, values, strict=True):
                rows = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)  # (C, B * positions)
                most = np.abs(rows).max(axis=1)
                largest[name] = np.maximum(largest[name], most) if name in largest else most
                total[name] = total.get(name, 0) + rows.sum(axis=1, dtype=np.float64)
                count[name] = count.get(name, 0) + rows.shape[1]
            progress.advance()
    if not count:
        raise ValueError("no images to measure the network's activations on")
    return {name: ChannelStats(largest[name], total[name] / count[name]) for name in names}
