"""INT8 for ONNX Runtime: calibrated, balanced, its rounding errors' means removed.

Weights have a symmetric int8 scale for each output channel, values one uint8 scale a tensor: what
the VNNI and AMX instructions of x86 multiply. Convolutions and what lies between them is quantised;
decoding and selection stay in float.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto
from torch import Tensor

from tinydet.deployment.activations import with_outputs
from tinydet.deployment.bias_correction import correct_biases
from tinydet.deployment.equalize import equalize
from tinydet.deployment.onnx_graph import find_convs
from tinydet.deployment.runtime import open_session

# What ONNX Runtime's CPU kernels compute in int8, or hand on without touching it.
_VALUES = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Add", "Mul")
_PLACES = ("Concat", "Split", "Reshape", "Transpose", "Resize")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")
_TYPES = {"Conv", *_VALUES, *_PLACES, *_POOLS}
_SCORES = "pair_scores"  # what goes into the selection


@dataclass
class Quantizer:
    """Quantises a float network again and again: its ranges are measured once.

    Attributes:
        model: the float network.
        images: batches (B, 3, H, W) uint8 that ranges are measured on.
        cache: the folder that holds them.
    """

    model: ModelProto
    images: Sequence[Tensor]
    cache: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)

    def quantize(
        self, keep: Collection[str] = (), alone: Collection[str] | None = None
    ) -> ModelProto:
        """Return the network in int8.

        Args:
            keep: names of nodes that stay in float.
            alone: names of the only nodes that are quantised; None is all that can be.
        """
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        nodes = quantizable(self.model) if alone is None else list(alone)
        folder = Path(self.cache.name)
        model = ModelProto()
        model.CopyFrom(self.model)  # It moves the weights of what it is given into files.
        with _without_warnings():
            quantize_static(
                model,
                folder / "int8.onnx",
                _Reader(self.model, self.images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=[name for name in nodes if name not in keep],
                calibration_cache_path=folder / "ranges.json",
            )
        model = onnx.load(folder / "int8.onnx")
        props = {prop.key: prop.value for prop in self.model.metadata_props}
        onnx.helper.set_model_props(model, props)
        return model


def improve(model: ModelProto, images: Sequence[Tensor]) -> tuple[ModelProto, int]:
    """Return a copy that loses less when it is quantised, and the number of places balanced.

    The copy is the same function but for its biases, which are off by what rounding will add.

    Args:
        model: the float network, folded.
        images: batches (B, 3, H, W) uint8.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    places = equalize(copy, images)
    correct_biases(copy, images)
    return copy, places


def quantizable(model: ModelProto) -> list[str]:
    """Return the names of the nodes that are a convolution, or lie before one."""
    makers = {name: node for node in model.graph.node for name in node.output}
    convs = [conv.node for conv in find_convs(model).values()]
    found: dict[int, NodeProto] = {}
    waiting = list(convs)
    while waiting:
        node = waiting.pop()
        if id(node) not in found:
            found[id(node)] = node
            waiting += [makers[name] for name in node.input if name in makers]
    return [n.name for n in model.graph.node if id(n) in found and n.op_type in _TYPES]


def sensitivity(quantizer: Quantizer, images: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
    """Yield each convolution and how much it alone, in int8, changes the scores.

    Args:
        quantizer: of the network.
        images: batches that the scores are compared on.

    Yields:
        The node's name, and the mean squared change of an (anchor, class) score.
    """
    expected = _scores(quantizer.model, images)
    for conv in find_convs(quantizer.model).values():
        found = _scores(quantizer.quantize(alone=[conv.node.name]), images)
        yield conv.node.name, _mean_square(expected, found)


def _scores(model: ModelProto, images: Sequence[Tensor]) -> list[np.ndarray]:
    session = open_session(with_outputs(model, [_SCORES]))
    return [session.run([_SCORES], {"images": batch.numpy()})[0] for batch in images]


def _mean_square(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    squares = [np.square(x - y, dtype=np.float64) for x, y in zip(a, b, strict=True)]
    return float(sum(s.sum() for s in squares) / sum(s.size for s in squares))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence ONNX Runtime's advice, which it gives on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Reader:
    """ONNX Runtime's interface to calibration data: each input once, then None."""

    def __init__(self, model: ModelProto, images: Sequence[Tensor]) -> None:
        self._name = model.graph.input[0].name
        self._left = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next input by name."""
        batch = next(self._left, None)
        return None if batch is None else {self._name: batch.numpy()}
