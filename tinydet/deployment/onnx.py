"""Export a detector as one self-contained ONNX file, verified against torch.

Input  `images`  (batch, 3, height, width) uint8 RGB; height and width multiples of 32.
       `sizes`   (batch, 2) float32 heights and widths of the images within it, without padding;
                 boxes are clipped to them. Optional: by default boxes are clipped to the input
Output `boxes`   (batch, max_detections, 4) float32 xyxy, pixels of the input; padded with 0
       `scores`  (batch, max_detections) float32, descending; padded with 0
       `labels`  (batch, max_detections) int64, index into the class names; padded with -1
       `count`   (batch,) int64, number of detections of each image

With `--no-nms`, without selection, for runtimes that have no NonMaxSuppression:
Output `scores`  (batch, anchors, classes) float32 in [0, 1]
       `boxes`   (batch, anchors, 4) float32 xyxy, pixels of the input, clipped to it; clip them to
                 the image without its padding before NMS
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from tinydet import __version__
from tinydet.atomic import check_out, replacing
from tinydet.config import Data, Experiment
from tinydet.data.canvas import PAD_VALUE
from tinydet.data.transforms import STRIDE
from tinydet.deployment.agreement import (
    Agreement,
    Equivalence,
    compare_detections,
    largest_differences,
    scores_and_boxes,
)
from tinydet.deployment.fixed_padding import with_fixed_padding
from tinydet.deployment.fold_checkpoint import folded_detector
from tinydet.deployment.images import random_images, resize_images, sample_images
from tinydet.deployment.onnx_detector import OUTPUTS, RAW, open_session, unpack
from tinydet.deployment.onnx_graph import with_outputs
from tinydet.deployment.onnx_selection import IR_VERSION, OPSET, with_selection
from tinydet.training.checkpoint import load_checkpoint
from tinydet.yolof.detector import Detector

logger = logging.getLogger(__name__)

_WITHOUT_NMS = ("scores", "boxes")


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written.

    Attributes:
        path: the ONNX file.
        equivalence: the file compared with torch.
        checked_on: the images and batch shapes they were compared on.
        folded_first: whether the checkpoint was of the training form.
    """

    path: Path
    equivalence: Equivalence
    checked_on: str
    folded_first: bool

    def lines(self) -> list[str]:
        """Return the outcome as lines of text."""
        first = ["folded      the checkpoint is of the training form"] if self.folded_first else []
        return [
            *first,
            f"checked on  {self.checked_on}",
            f"agreement   {self.equivalence.line()}",
            f"wrote       {self.path} ({self.path.stat().st_size / 1e6:.1f} MB)",
        ]


def export_checkpoint(
    source: Path,
    out: Path | None = None,
    size: tuple[int, int] | None = None,
    nms: bool = True,
    *,
    experiment: Experiment | None = None,
    overrides: Sequence[str] = (),
) -> Exported:
    """Export a checkpoint of either form as one ONNX file.

    Args:
        source: the checkpoint; one of the training form is folded first.
        out: the ONNX file; by default the source's name with `.onnx`.
        size: (H, W) of the input; None lets both vary.
        nms: select detections; False returns every anchor's scores and box.
        experiment: replaces the stored one, for example where its data set is elsewhere.
        overrides: "a.b=value" for the experiment.

    Raises:
        ValueError: the size is not a multiple of 32, the network cannot be exported, or the file is
            not equivalent to torch; nothing is written then.
    """
    check_out(out, [source], [".onnx"])
    checkpoint = load_checkpoint(source, experiment, overrides=overrides)
    detector = folded_detector(checkpoint)
    images = sample_images(checkpoint.experiment, 4, 1)
    images.warn_if_random()
    batches = list(images.batches) if size is None else []
    # Test images rather than noise where possible: on noise, ties and rounding may dominate.
    for n in (1, 3):
        same_size = [resize_images(batch, size or (64 + 32 * n, 96)) for batch in images.batches]
        batches.append(torch.cat(same_size * n)[:n])
    logger.info("exporting for inputs of %s", f"{size[0]}x{size[1]}" if size else "any size")
    model = export_detector(detector, checkpoint.experiment.data, size, nms)
    logger.info("comparing with torch")
    path = out or source.with_suffix(".onnx")
    equivalence = write_checked(model, path, detector, batches)
    shapes = ", ".join(sorted({"x".join(map(str, batch.shape)) for batch in batches}))
    return Exported(path, equivalence, f"{images.source}; {shapes}", not checkpoint.folded)


def export_detector(
    detector: Detector, data: Data, size: tuple[int, int] | None = None, nms: bool = True
) -> ModelProto:
    """Build the ONNX model of a detector in eval mode; nothing is written.

    Args:
        detector: usually folded.
        data: how images are resized for it, for the file's metadata.
        size: (H, W) of the input; None lets both vary.
        nms: select detections; False returns every anchor's scores and box.

    Raises:
        ValueError: the size is not a multiple of 32, or the network cannot be exported.
    """
    if size and (min(size) < 32 or any(side % 32 for side in size)):
        raise ValueError(f"--size {size[0]} {size[1]}: both must be multiples of 32")
    model = _network_graph(detector, size, RAW if nms else _WITHOUT_NMS)
    if nms:
        model = with_selection(model, detector.config, len(detector.classes))
    model.producer_name, model.producer_version = "tinydet", __version__
    model.doc_string = str(__doc__)
    onnx.helper.set_model_props(model, _metadata(detector, data, size))
    onnx.checker.check_model(model, full_check=True)
    return model


def write_checked(
    model: ModelProto, path: Path, detector: Detector, batches: Sequence[Tensor]
) -> Equivalence:
    """Write an ONNX model if it is equivalent to the detector.

    Args:
        model: the model to write.
        path: the file; an existing one is replaced atomically.
        detector: the reference.
        batches: (B, 3, H, W) uint8 images.

    Raises:
        ValueError: they differ, or ONNX Runtime is missing or rejects the model.
    """
    found = compare_with_torch(model, detector, batches)
    if not found.same:
        raise ValueError(f"{path}: not written, ONNX differs from torch: {found.line()}")
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return found


def compare_with_torch(
    model: ModelProto, detector: Detector, batches: Sequence[Tensor]
) -> Equivalence:
    """Compare an ONNX model, run by ONNX Runtime on the CPU, with the detector.

    Raw scores and boxes are compared as well as detections: otherwise two that detect nothing would
    pass whatever they compute.
    """
    nms = len(model.graph.output) > len(_WITHOUT_NMS)
    session = open_session(with_outputs(model, RAW) if nms else model)
    names = [output.name for output in session.get_outputs()]
    total = Equivalence()
    for images in batches:
        outputs = session.run(names, {"images": images.numpy()})
        values = dict(zip(names, map(torch.from_numpy, outputs), strict=True))
        with torch.inference_mode():
            expected = scores_and_boxes(detector, images)
        scores, boxes = (values[name] for name in (RAW if nms else _WITHOUT_NMS))
        raw = expected, (scores.reshape(expected[0].shape), boxes)
        agreement = Agreement()
        if nms:
            found = unpack(*(values[name] for name in OUTPUTS))
            agreement = compare_detections(detector.detect(images), found, detector.config, raw)
        total = total.merge(Equivalence(*largest_differences(*raw), agreement))
    return total


class _ScoresAndBoxes(nn.Module):
    def __init__(self, detector: Detector, pairs: bool) -> None:
        super().__init__()
        self.detector = detector
        self.pairs = pairs

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = scores_and_boxes(self.detector, images)  # (B, A, K), (B, A, 4)
        return scores.flatten(1) if self.pairs else scores, boxes


def export_network(
    network: nn.Module, images: Tensor, dynamic: dict[int, Any], outputs: Sequence[str]
) -> ModelProto:
    """Export a network with one input, `images`, with torch's exporter.

    Args:
        network: in eval mode.
        images: an example.
        dynamic: the dimensions of the images that vary, for torch.export.
        outputs: names of what it returns.

    Raises:
        ValueError: torch cannot export it.
    """
    try:
        # The exporter prints its progress and warns about its own deprecations.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (images,),
                input_names=["images"],
                output_names=list(outputs),
                dynamic_shapes={"images": dynamic},
                opset_version=OPSET,
                external_data=False,
                dynamo=True,
                optimize=True,
            )
    except Exception as error:
        # The exporter raises many types of errors, with messages of many lines.
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(f"torch cannot export this network ({reason})") from error
    assert program is not None  # torch returns None only for the exporter without dynamo.
    model = program.model_proto
    model.ir_version = IR_VERSION
    # The exporter declares other domains although it uses none of their operators.
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    return model


def _network_graph(
    detector: Detector, size: tuple[int, int] | None, outputs: tuple[str, str]
) -> ModelProto:
    images = random_images(2, size or (128, 160))
    other = random_images(1, size or (64, 96))
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch")}
    if size is None:
        dynamic[2] = 32 * torch.export.Dim("rows", min=1)
        dynamic[3] = 32 * torch.export.Dim("columns", min=1)
    padded = with_fixed_padding(detector, [images, other])
    network = _ScoresAndBoxes(cast(Detector, padded), pairs=outputs == RAW).eval()
    try:
        return export_network(network, images, dynamic, outputs)
    except ValueError as error:
        hint = "" if size else "; it may work for one size: --size H W"
        raise ValueError(f"{detector.config.backbone}: {error}{hint}") from error


def _metadata(detector: Detector, data: Data, size: tuple[int, int] | None) -> dict[str, str]:
    config = detector.config
    values = {
        "classes": list(detector.classes),
        "stride": detector.stride,
        "input": (
            "uint8 RGB, NCHW, resized to image_size (the longer side, or both unless keep_ratio; "
            "the shorter at most short_side unless 0), padded with pad_value at the right and "
            "bottom to whole multiples of size_multiple"
        ),
        "image_size": data.image_size,
        "keep_ratio": data.keep_ratio,
        "short_side": data.short_side,
        "pad_value": PAD_VALUE,
        "size_multiple": STRIDE,
        "size": list(size) if size else None,
        "score_threshold": config.score_threshold,
        "nms_iou": config.nms_iou,
        "candidates": config.candidates,
        "max_detections": config.max_detections,
    }
    return {name: json.dumps(value) for name, value in values.items()}
