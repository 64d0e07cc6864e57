"""One self-contained ONNX file: uint8 pixels in, detections out, checked against torch.

Input  `images`  (batch, 3, height, width) uint8 RGB; height and width multiples of 32.
       `sizes`   (batch, 2) float32 heights and widths of the images within it, without padding, to
                 which boxes are clipped; may be left out: then they are clipped to the input
Output `boxes`   (batch, max_detections, 4) float32 xyxy, pixels of the input; 0 where there is none
       `scores`  (batch, max_detections) float32, descending; 0 where there is none
       `labels`  (batch, max_detections) int64, index into the class names; -1 where there is none
       `count`   (batch,) int64, detections of each image

Without selection, for runtimes that have no NonMaxSuppression (`--no-nms`):
Output `scores`  (batch, anchors, classes) float32 in [0, 1]
       `boxes`   (batch, anchors, 4) float32 xyxy, pixels of the input, clipped to it: clip them to
                 the image without its padding before NMS
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from tinydet import __version__
from tinydet.atomic import replacing
from tinydet.config import Data, Model
from tinydet.data.canvas import PAD_VALUE
from tinydet.data.transforms import STRIDE
from tinydet.deployment.activations import with_outputs
from tinydet.deployment.agreement import Agreement, compare_detections
from tinydet.deployment.decoding import (
    MAX_BOX,
    MAX_SCORE,
    largest_differences,
    scores_and_boxes,
)
from tinydet.deployment.fixed_padding import with_fixed_padding
from tinydet.deployment.images import random_images, resize_images, sample_images
from tinydet.deployment.onnx_selection import IR_VERSION, OPSET, selection_graph
from tinydet.deployment.reparameterize import fold_detector
from tinydet.deployment.runtime import OUTPUTS, open_session, unpack
from tinydet.experiment_file import experiment_from_dict
from tinydet.training.checkpoint import load_detector, read_checkpoint
from tinydet.yolof.detector import Detector

RAW = ("pair_scores", "anchor_boxes")  # what goes into the selection
_WITHOUT_NMS = ("scores", "boxes")


@dataclass(frozen=True)
class Check:
    """An ONNX model compared with torch.

    Attributes:
        max_score: largest difference of any (anchor, class) score.
        max_box: largest difference of a coordinate of the best anchors' boxes, in pixels.
        agreement: the detections compared.
    """

    max_score: float = 0.0
    max_box: float = 0.0
    agreement: Agreement = field(default_factory=Agreement)

    @property
    def same(self) -> bool:
        """Whether both compute the same and find the same."""
        near = self.max_score <= MAX_SCORE and self.max_box <= MAX_BOX
        return near and self.agreement.same

    def line(self) -> str:
        """Return the outcome as a line of text."""
        return (
            f"scores within {self.max_score:.1e} (allowed {MAX_SCORE:.0e}), boxes within "
            f"{self.max_box:.1e} px (allowed {MAX_BOX}); {self.agreement.line()}"
        )


@dataclass(frozen=True)
class Exported:
    """What was written, and on what grounds.

    Attributes:
        path: the ONNX file.
        check: the file compared with torch.
        checked_on: the images and batch shapes they were compared on.
        folded_first: whether the checkpoint was of the training form.
    """

    path: Path
    check: Check
    checked_on: str
    folded_first: bool

    def lines(self) -> list[str]:
        """Return the outcome as lines of text."""
        first = ["folded      the checkpoint is of the training form"] if self.folded_first else []
        return [
            *first,
            f"checked on  {self.checked_on}",
            f"agreement   {self.check.line()}",
            f"wrote       {self.path} ({self.path.stat().st_size / 1e6:.1f} MB)",
        ]


def export_checkpoint(
    source: Path,
    out: Path | None = None,
    size: tuple[int, int] | None = None,
    nms: bool = True,
) -> Exported:
    """Export a checkpoint, of either form, as one ONNX file.

    Args:
        source: the checkpoint; one of the training form is folded first.
        out: where to; the source's name with `.onnx` by default.
        size: (H, W) of the input; None lets both vary.
        nms: select detections; False returns every anchor's scores and box.

    Raises:
        ValueError: the size is no multiple of 32, the network cannot be exported, or the file does
            not find what torch finds; nothing is written then.
    """
    content = read_checkpoint(source)
    experiment = experiment_from_dict(content["experiment"])
    detector = load_detector(source)
    training_form = content["form"] == "training"
    if training_form:
        detector, _ = fold_detector(detector)
    images = sample_images(experiment, 4, 1)
    batches = list(images.batches) if size is None else []
    # Photographs, not noise, where there are any: on noise a network may be all rounding.
    for n in (1, 3):
        same_size = [resize_images(batch, size or (64 + 32 * n, 96)) for batch in images.batches]
        batches.append(torch.cat(same_size * n)[:n])
    model = export_detector(detector, experiment.data, size, nms)
    path = out or source.with_suffix(".onnx")
    check = write_checked(model, path, detector, batches)
    shapes = ", ".join(sorted({"x".join(map(str, batch.shape)) for batch in batches}))
    return Exported(path, check, f"{images.source}; {shapes}", training_form)


def export_detector(
    detector: Detector, data: Data, size: tuple[int, int] | None = None, nms: bool = True
) -> ModelProto:
    """Build the ONNX model of a detector in eval mode; nothing is written.

    Args:
        detector: usually folded.
        data: how images are resized for it, which the file's metadata tells.
        size: (H, W) of the input; None lets both vary.
        nms: select detections; False returns every anchor's scores and box.

    Raises:
        ValueError: the size is no multiple of 32, or the network cannot be exported.
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
) -> Check:
    """Write an ONNX model if ONNX Runtime finds in it what torch finds in the detector.

    Args:
        model: what is written.
        path: where to; replaced only at the end.
        detector: what it must agree with.
        batches: (B, 3, H, W) uint8 images.

    Raises:
        ValueError: they differ, or ONNX Runtime is missing or refuses the model.
    """
    check = check_against_torch(model, detector, batches)
    if not check.same:
        raise ValueError(f"{path}: not written, ONNX differs from torch: {check.line()}")
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return check


def check_against_torch(model: ModelProto, detector: Detector, batches: Sequence[Tensor]) -> Check:
    """Compare ONNX Runtime on the CPU with the detector.

    All scores and the best anchors' boxes are compared as well as the detections: two that find
    nothing would agree whatever they compute.
    """
    nms = len(model.graph.output) > len(_WITHOUT_NMS)
    session = open_session(with_outputs(model, RAW) if nms else model)
    names = [output.name for output in session.get_outputs()]
    check = Check()
    for images in batches:
        outputs = session.run(names, {"images": images.numpy()})
        told = dict(zip(names, map(torch.from_numpy, outputs), strict=True))
        with torch.inference_mode():
            expected = scores_and_boxes(detector, images)
        scores, boxes = (told[name] for name in (RAW if nms else _WITHOUT_NMS))
        raw = expected, (scores.reshape(expected[0].shape), boxes)
        max_score, max_box = largest_differences(*raw)
        agreement = Agreement()
        if nms:
            found = unpack(*(told[name] for name in OUTPUTS))
            agreement = compare_detections(detector.detect(images), found, detector.config, raw)
        check = Check(
            max(check.max_score, max_score),
            max(check.max_box, max_box),
            check.agreement.merge(agreement),
        )
    return check


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
    """Export a network of one input, `images`, by torch.

    Args:
        network: in eval mode.
        images: an example.
        dynamic: dimensions of the images that vary, as torch.export has them.
        outputs: names of what it returns.

    Raises:
        ValueError: torch cannot export it.
    """
    try:
        # The exporter reports its steps on stdout, and its own deprecations as warnings.
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
        # The exporter raises errors of many kinds, over many lines.
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(f"torch cannot export this network ({reason})") from error
    model = program.model_proto
    model.ir_version = IR_VERSION
    # Older stages of the exporter leave other domains declared though none of their nodes is used.
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    return model


def with_selection(network: ModelProto, config: Model, classes: int) -> ModelProto:
    """Return a network that returns `RAW` with the selection of detections behind it.

    Args:
        network: of `export_network`.
        config: thresholds of the selection.
        classes: their number.
    """
    selection = selection_graph(config, classes)
    model = onnx.compose.merge_models(network, selection, [(name, name) for name in RAW])
    del model.opset_import[1:]  # Both parts' own, one and the same.
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
    network = _ScoresAndBoxes(padded, pairs=outputs == RAW).eval()
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
