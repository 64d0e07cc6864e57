"""Quantize a checkpoint to int8 for ONNX Runtime, with accuracy and speed before and after.

Weights have a symmetric int8 scale for each output channel, activations one uint8 scale per
tensor: the types that the VNNI and AMX instructions of x86 multiply. Convolutions and what lies
between them are quantized; decoding and selection stay in float.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

from tinydet.atomic import check_out, replacing
from tinydet.config import Experiment
from tinydet.data.dataset import load_split
from tinydet.data.index import Index
from tinydet.deployment.equalize import prepare_for_int8
from tinydet.deployment.fold_checkpoint import folded_detector
from tinydet.deployment.images import sample_images
from tinydet.deployment.onnx import export_detector
from tinydet.deployment.onnx_detector import (
    RAW,
    OnnxDetector,
    SplitOnnxDetector,
    open_session,
    pad_to_size,
)
from tinydet.deployment.onnx_graph import find_convs, with_outputs
from tinydet.deployment.timer import measure
from tinydet.progress import Progress
from tinydet.report.table import text_table
from tinydet.training.checkpoint import load_checkpoint
from tinydet.training.evaluate import evaluate_detector, require_objects

logger = logging.getLogger(__name__)

# What ONNX Runtime's CPU kernels compute in int8, or pass through unchanged.
_TYPES = {
    *("Conv", "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Add", "Mul"),
    *("Concat", "Split", "Reshape", "Transpose", "Resize"),
    *("MaxPool", "AveragePool", "GlobalAveragePool"),
}
_SENSITIVITY_IMAGES = 8
_TIMED_IMAGES = 50
_TIMED_BATCHES = 10


@dataclass
class Quantizer:
    """Quantizes a float network repeatedly; activation ranges are measured once.

    Attributes:
        model: the float network.
        images: batches (B, 3, H, W) uint8 that ranges are measured on.
        cache: the folder that holds the ranges.
    """

    model: ModelProto
    images: Sequence[Tensor]
    cache: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def quantize(
        self, keep: Collection[str] = (), only: Collection[str] | None = None
    ) -> ModelProto:
        """Return the network in int8.

        Args:
            keep: names of nodes that stay in float.
            only: names of the nodes to quantize; None is all that can be.
        """
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        nodes = quantizable(self.model) if only is None else list(only)
        folder = Path(self.cache.name)
        model = ModelProto()
        model.CopyFrom(self.model)  # quantize_static moves its argument's weights into files.
        with (
            _without_warnings(),
            Progress("measuring ranges", len(self.images), "images") as progress,
        ):
            quantize_static(
                model,
                folder / "int8.onnx",
                _CalibrationReader(self.model, self.images, progress),
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


def quantize_checkpoint(
    source: Path,
    out: Path | None = None,
    images: int = 64,
    budget: float = 0.01,
    size: tuple[int, int] | None = None,
    experiment: Experiment | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[str]:
    """Quantize a checkpoint of either form, yielding the report line by line.

    Layers are kept in float, the most sensitive first and twice as many each time, until the loss
    is within the budget. The loss is measured on the experiment's test split, like the table's
    figures.

    Args:
        source: the checkpoint.
        out: the ONNX file; by default the checkpoint's name with `.int8.onnx`.
        images: training images that ranges are measured on.
        budget: AP50, in 0..1, that may be lost.
        size: (H, W) of the input; None lets both vary.
        experiment: replaces the stored one, for example where its data set is elsewhere.
        overrides: "a.b=value" for the experiment.

    Raises:
        ValueError: an option is wrong, the data is missing, the test split has no object to find,
            or the budget cannot be kept; nothing is written then.
    """
    if images < 1:
        raise ValueError(f"--images {images}: must be at least 1")
    if not 0 <= budget <= 1:
        raise ValueError(f"--budget {budget:g}: must be from 0 to 1; 0.01 is a point of AP50")
    check_out(out, [source], [".onnx"])
    checkpoint = load_checkpoint(source, experiment, overrides=overrides)
    detector = folded_detector(checkpoint)
    data = replace(checkpoint.experiment.data, classes=detector.classes)
    experiment = replace(checkpoint.experiment, data=data)
    index = load_split(data, data.test_split)
    require_objects(index)
    calibration = sample_images(experiment, images, 1, data.train_split)
    if not calibration.real:
        raise ValueError(f"no training images to measure ranges on: {calibration.source}")
    yield f"calibration {calibration.source}"
    batches = [pad_to_size(batch, size) for batch in calibration.batches]

    plain = export_detector(detector, data, size)
    forms = {"float32": plain, "int8, naive": Quantizer(plain, batches).quantize()}
    prepared, places = prepare_for_int8(plain, batches)
    quantizer = Quantizer(prepared, batches)
    best, name = quantizer.quantize(), "int8"
    forms[name] = best
    yield f"equalized   channels at {places} places between convolutions; biases corrected"
    accuracy = {form: _ap50(model, index, experiment) for form, model in forms.items()}
    if not accuracy["float32"] > 0:
        logger.warning(
            "the network finds nothing in float32 either: a budget of AP50 says nothing here"
        )
    kept: list[str] = []
    if accuracy["float32"] - accuracy[name] > budget:
        yield f"sensitivity {_points(accuracy, name)} points of AP50 lost: layer by layer"
        few = batches[:_SENSITIVITY_IMAGES]
        order = sorted(sensitivity(quantizer, few), key=lambda found: -found[1])
        yield from (f"            {node}: {change:.2e}" for node, change in order[:8])
        count = 1
        while accuracy["float32"] - accuracy[name] > budget and len(kept) < len(order):
            kept = [node for node, _ in order[:count]]
            best, name = quantizer.quantize(keep=kept), f"int8 but {len(kept)} layers"
            forms[name], accuracy[name] = best, _ap50(best, index, experiment)
            yield f"            {len(kept)} in float: AP50 {100 * accuracy[name]:.2f} %"
            count *= 2
    yield f"timed       in ONNX Runtime, {torch.get_num_threads()} threads"
    yield from _table(forms, accuracy, batches)
    lost = accuracy["float32"] - accuracy[name]
    if lost > budget:
        raise ValueError(
            f"{source}: int8 loses {_points(accuracy, name)} points of AP50, more than the "
            f"{100 * budget:g} of --budget {budget:g}: nothing written"
        )
    path = out or source.with_suffix(".int8.onnx")
    with replacing(path) as temporary:
        temporary.write_bytes(best.SerializeToString())
    yield f"wrote       {path} ({path.stat().st_size / 1e6:.1f} MB), {len(kept)} layers in float"


def quantizable(model: ModelProto) -> list[str]:
    """Return the names of the nodes of supported types that are convolutions or precede one."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found: dict[int, NodeProto] = {}
    waiting = [conv.node for conv in find_convs(model).values()]
    while waiting:
        node = waiting.pop()
        if id(node) not in found:
            found[id(node)] = node
            waiting += [makers[name] for name in node.input if name in makers]
    return [n.name for n in model.graph.node if id(n) in found and n.op_type in _TYPES]


def sensitivity(quantizer: Quantizer, images: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
    """Quantize each convolution alone and measure how much the scores change.

    Args:
        quantizer: of the network.
        images: batches that the scores are compared on.

    Yields:
        The node's name, and the mean squared change of an (anchor, class) score.
    """
    expected = _scores(quantizer.model, images)
    convs = find_convs(quantizer.model).values()
    with Progress("quantizing layer by layer", len(convs), "layers") as progress:
        for conv in convs:
            found = _scores(quantizer.quantize(only=[conv.node.name]), images)
            yield conv.node.name, _mean_square(expected, found)
            progress.advance()


def _scores(model: ModelProto, images: Sequence[Tensor]) -> list[np.ndarray]:
    session = open_session(with_outputs(model, RAW[:1]))
    return [session.run(RAW[:1], {"images": batch.numpy()})[0] for batch in images]


def _mean_square(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    squares = [np.square(x - y, dtype=np.float64) for x, y in zip(a, b, strict=True)]
    return float(sum(s.sum() for s in squares) / sum(s.size for s in squares))


def _ap50(model: ModelProto, index: Index, experiment: Experiment) -> float:
    cpu = torch.device("cpu")
    detector = OnnxDetector(model, threads=torch.get_num_threads())
    metrics = evaluate_detector(detector, index, experiment.data, 1, cpu)
    return metrics.ap50


def _points(accuracy: Mapping[str, float], name: str) -> str:
    return f"{100 * (accuracy['float32'] - accuracy[name]):.2f}"


def _table(
    forms: Mapping[str, ModelProto], accuracy: Mapping[str, float], images: Sequence[Tensor]
) -> list[str]:
    threads = torch.get_num_threads()
    candidates = {name: SplitOnnxDetector(model, threads) for name, model in forms.items()}
    timings = measure(candidates, images[:_TIMED_BATCHES], _TIMED_IMAGES)
    rows = [
        [
            name,
            f"{100 * accuracy[name]:.2f}",
            _points(accuracy, name),
            f"{model.ByteSize() / 1e6:.1f}",
            f"{timings[name].median:.2f}",
            f"{timings[name].images_per_second:.1f}",
        ]
        for name, model in forms.items()
    ]
    return text_table(["", "AP50 %", "lost", "MB", "median ms", "img/s"], rows)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence ONNX Runtime's advice: its Python code logs it on the root logger."""
    import onnxruntime

    def refuse(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logging.root.addFilter(refuse)
    onnxruntime.set_default_logger_severity(3)  # errors; of the sessions that it opens
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default: warnings
        logging.root.removeFilter(refuse)


class _CalibrationReader:
    """ONNX Runtime's interface to calibration data: each input once, then None."""

    def __init__(self, model: ModelProto, images: Sequence[Tensor], progress: Progress) -> None:
        self._name = model.graph.input[0].name
        self._left = iter(images)
        self._progress = progress

    def get_next(self) -> dict[str, Any] | None:
        """Return the next input by name."""
        batch = next(self._left, None)
        self._progress.advance()
        return None if batch is None else {self._name: batch.numpy()}
