"""Exported detectors, run by ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto
from onnx.utils import Extractor
from torch import Tensor

from tinydet.config import Data
from tinydet.data.canvas import PAD_VALUE
from tinydet.yolof.decode import Detections, place_in_images, sizes_in_input

RAW = ("pair_scores", "anchor_boxes")  # scores and boxes of all anchors, the selection's inputs
OUTPUTS = ("boxes", "scores", "labels", "count")
_METADATA = ("classes", "size", "score_threshold", "image_size", "keep_ratio", "short_side")


class OnnxDetector:
    """A file of `deploy/export_onnx.py`, run by ONNX Runtime.

    Attributes:
        classes: class names in label order.
        data: how images are resized for it.
        size: (H, W) of the input it was exported for; None takes any.
        score_threshold: its output has only detections with a higher score.
    """

    def __init__(
        self, model: str | Path | ModelProto, device: str | torch.device = "cpu", threads: int = 0
    ) -> None:
        """Load a model.

        Args:
            model: the file, or its content.
            device: "cpu", "cuda" or "cuda:N".
            threads: CPU threads of one operator; 0 lets ONNX Runtime choose.

        Raises:
            ValueError: the file is missing or was not exported by TinyDet, or ONNX Runtime is
                missing, rejects it, or does not have the device.
        """
        if not isinstance(model, ModelProto):
            model = Path(model)
        name = model if isinstance(model, Path) else "the network"
        self._session = open_session(model, device, threads)
        metadata = self._session.get_modelmeta().custom_metadata_map
        try:
            values = {key: json.loads(metadata[key]) for key in _METADATA}
        except (KeyError, ValueError) as error:
            missing = next((key for key in _METADATA if key not in metadata), "classes")
            raise ValueError(
                f"{name}: its metadata has no {missing!r}: not exported by this "
                "TinyDet's deploy/export_onnx.py"
            ) from error
        outputs = tuple(output.name for output in self._session.get_outputs())
        if outputs != OUTPUTS:
            raise ValueError(
                f"{name}: returns {', '.join(outputs)}: exported with --no-nms; export it without"
            )
        self.classes: tuple[str, ...] = tuple(values["classes"])
        self.size: tuple[int, int] | None = tuple(values["size"]) if values["size"] else None
        self.score_threshold: float = values["score_threshold"]
        self.data = Data(
            image_size=values["image_size"],
            keep_ratio=values["keep_ratio"],
            short_side=values["short_side"],
        )

    def detect(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> list[Detections]:
        """Detect objects in a batch, like `tinydet.yolof.detector.Detector.detect`.

        Args:
            images: (B, 3, H, W) uint8 RGB; H and W multiples of 32, at most the fixed size.
            sizes: (H, W) of each original image; boxes are clipped to it before NMS.
            scales: (sy, sx) of each image, network pixels per original pixel.

        Raises:
            ValueError: the images are larger than the file's fixed size.
        """
        inputs = {"images": pad_to_size(images, self.size).cpu().contiguous().numpy()}
        if self._session.get_overridable_initializers():  # Files of older versions have none.
            limits = sizes_in_input(images, sizes, scales)
            inputs["sizes"] = np.array(limits, np.float32)
        outputs = self._session.run(OUTPUTS, inputs)
        return place_in_images(unpack(*map(torch.from_numpy, outputs)), sizes, scales)


class SplitOnnxDetector:
    """An exported detector cut before the selection, so that each part can be timed.

    It is called like `tinydet.yolof.detector.Detector`: first `raw = split(images)`, then
    `split.select(*raw, image_size)`.
    """

    def __init__(self, model: ModelProto | Path, threads: int = 0, device: str = "cpu") -> None:
        """Cut and load a model.

        Args:
            model: what `deploy/export_onnx.py` or `deploy/quantize.py` writes, or the file.
            threads: CPU threads of one operator; 0 lets ONNX Runtime choose.
            device: "cpu" or "cuda".

        Raises:
            ValueError: the file is missing or no ONNX file, was exported without selection, or ONNX
                Runtime rejects it.
        """
        name = "the ONNX file"
        if isinstance(model, Path):
            if not model.is_file():
                raise ValueError(f"{model}: no such file")
            name = str(model)
            try:
                model = onnx.load(model)
            except Exception as error:  # protobuf's have no base class of their own.
                raise ValueError(f"{name}: not an ONNX file") from error
        if not {output.name for output in model.graph.output} >= set(OUTPUTS):
            raise ValueError(
                f"{name}: selects no detections: export it with deploy/export_onnx.py, and "
                "without --no-nms"
            )
        sizes = [prop.value for prop in model.metadata_props if prop.key == "size"]
        size = json.loads(sizes[0]) if sizes else None
        self._size: tuple[int, int] | None = tuple(size) if size else None
        self._network = open_session(_part(model, ["images"], RAW), device, threads)
        self._selection = open_session(_part(model, RAW, OUTPUTS), device, threads)

    def __call__(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (B, A * K) and boxes (B, A, 4) of all anchors.

        Args:
            images: (B, 3, H, W) uint8 RGB on the CPU, at most of the file's fixed size.

        Raises:
            ValueError: they are larger.
        """
        padded = pad_to_size(images, self._size)
        scores, boxes = self._network.run(RAW, {"images": padded.numpy()})
        return scores, boxes

    def select(
        self, scores: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]
    ) -> list[np.ndarray]:
        """Select detections; the network has already clipped the boxes to `image_size`."""
        del image_size
        outputs: list[np.ndarray] = self._selection.run(
            OUTPUTS, dict(zip(RAW, (scores, boxes), strict=True))
        )
        return outputs


def _part(model: ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
    part: ModelProto = Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(
        list(inputs), list(outputs)
    )
    part.ir_version = model.ir_version
    return part


def pad_to_size(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Pad a batch (B, 3, H, W) uint8 at the right and bottom to a fixed size; None leaves it.

    Raises:
        ValueError: it is larger.
    """
    height, width = images.shape[-2:]
    if size is None or size == (height, width):
        return images
    down, right = size[0] - height, size[1] - width
    if min(down, right) < 0:
        raise ValueError(
            f"an input of {height}x{width} for a file of {size[0]}x{size[1]}: export one for any "
            "size (without --size), or for both sides that long"
        )
    return F.pad(images, (0, right, 0, down), value=PAD_VALUE)


def unpack(boxes: Tensor, scores: Tensor, labels: Tensor, count: Tensor) -> list[Detections]:
    """Turn an ONNX file's padded outputs into detections, image by image."""
    return [
        Detections(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(count.tolist())
    ]


def open_session(
    model: Path | ModelProto, device: str | torch.device = "cpu", threads: int = 0
) -> Any:
    """Return an ONNX Runtime session.

    Args:
        model: a file, or its content.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of one operator; 0 lets ONNX Runtime choose.

    Raises:
        ValueError: the file is missing, or ONNX Runtime is missing, rejects it, or does not have
            the device or cannot use it.
    """
    if isinstance(model, Path) and not model.is_file():
        raise ValueError(f"{model}: no such file")
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("onnxruntime is missing: pip install 'tinydet[deploy]'") from None
    place = torch.device(device)
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    provider = providers.get(place.type, place.type)
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ValueError(
            f"device {device}: this ONNX Runtime only has {', '.join(available)}; use device cpu"
            + (", or pip install onnxruntime-gpu" if place.type == "cuda" else "")
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Threads that spin while idle slow down whatever else runs, such as other timed candidates.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    settings = {} if place.index is None or place.type == "cpu" else {"device_id": place.index}
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=[provider], provider_options=[settings]
        )
    except Exception as error:  # ONNX Runtime's exceptions have no other common base class.
        name = model if isinstance(model, Path) else "the network"
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: ONNX Runtime rejects it: {reason}") from error
    if provider not in session.get_providers():  # It falls back to the CPU without a word.
        raise ValueError(
            f"device {device}: ONNX Runtime cannot use it (CUDA or cuDNN libraries may be missing "
            "or of another version); use device cpu"
        )
    return session
