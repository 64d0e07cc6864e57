"""A trained detector as a function of images: from a checkpoint, or from an ONNX file alone.

detector = Detector.load("best.onnx")
(found,) = detector([read_image("photo.jpg")])  # boxes in pixels of the photo
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor

from tinydet.config import Data, Experiment
from tinydet.data.canvas import PAD_VALUE
from tinydet.data.loader import collate
from tinydet.data.sample import Sample
from tinydet.data.transforms import test_transform
from tinydet.deployment.reparameterize import fold_detector
from tinydet.experiment_file import experiment_from_dict
from tinydet.training.checkpoint import load_detector, read_checkpoint
from tinydet.yolof.decode import Detections, place_in_images, sizes_in_input
from tinydet.yolof.network import Network

OUTPUTS = ["boxes", "scores", "labels", "count"]


class OnnxNetwork:
    """A file of `deploy/export_onnx.py`, run by ONNX Runtime.

    Attributes:
        classes: class names in label order.
        data: how images are resized for it.
        size: (H, W) of the input it was exported for; None takes any.
        score_threshold: detections with a lower score are not in its output.
        session: ONNX Runtime's.
    """

    def __init__(
        self, path: str | Path | ModelProto, device: str | torch.device = "cpu", threads: int = 0
    ) -> None:
        """Load a file.

        Args:
            path: the file, or what would be in it.
            device: "cpu" or "cuda".
            threads: of the CPU for one operator; 0 is ONNX Runtime's choice.

        Raises:
            ValueError: there is no such file, it was not exported by TinyDet, ONNX Runtime is
                missing or refuses it, or has no such device.
        """
        model = path if isinstance(path, ModelProto) else Path(path)
        path = "the network" if isinstance(path, ModelProto) else path
        self.session = open_session(model, torch.device(device).type, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            told = {name: json.loads(metadata[name]) for name in _METADATA}
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: its metadata has no {_first_missing(metadata)!r}: not exported by this "
                "TinyDet's deploy/export_onnx.py"
            ) from error
        outputs = [output.name for output in self.session.get_outputs()]
        if outputs != OUTPUTS:
            raise ValueError(
                f"{path}: returns {', '.join(outputs)}: exported with --no-nms; export it without"
            )
        self.classes: tuple[str, ...] = tuple(told["classes"])
        self.size: tuple[int, int] | None = tuple(told["size"]) if told["size"] else None
        self.score_threshold: float = told["score_threshold"]
        self.data = Data(
            image_size=told["image_size"],
            keep_ratio=told["keep_ratio"],
            short_side=told["short_side"],
        )

    def detect(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> list[Detections]:
        """Detect objects in a batch, like `tinydet.yolof.detector.Detector.detect`.

        Args:
            images: (B, 3, H, W) uint8 RGB; H and W multiples of 32, not above a fixed size.
            sizes: (H, W) of each original image; boxes are clipped to it, before NMS.
            scales: (sy, sx) of each image, network pixels an original pixel.

        Raises:
            ValueError: the images are larger than the file's fixed size.
        """
        inputs = {"images": pad_to_size(images, self.size).cpu().contiguous().numpy()}
        if self.session.get_overridable_initializers():  # Files of older versions have none.
            limits = sizes_in_input(images, sizes, scales)
            inputs["sizes"] = np.array(limits, np.float32)
        outputs = self.session.run(OUTPUTS, inputs)
        return place_in_images(unpack(*map(torch.from_numpy, outputs)), sizes, scales)


@dataclass(frozen=True)
class Detector:
    """Finds objects in images of any size.

    Attributes:
        network: what runs.
        data: how images are resized for it.
        device: where the network's inputs go.
        score_threshold: lowest score of a detection, exclusive.
    """

    network: Network
    data: Data
    device: torch.device
    score_threshold: float

    @classmethod
    def load(
        cls,
        path: str | Path,
        experiment: Experiment | None = None,
        device: str | torch.device = "cpu",
        score_threshold: float | None = None,
    ) -> Detector:
        """Load a checkpoint, or an ONNX file if the name ends in .onnx; see the two below."""
        if Path(path).suffix == ".onnx":
            return cls.from_onnx(path, device, score_threshold)
        return cls.from_checkpoint(path, experiment, device, score_threshold)

    @classmethod
    def from_onnx(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        score_threshold: float | None = None,
    ) -> Detector:
        """Load a file of `deploy/export_onnx.py`; it needs no other file.

        Args:
            path: the file.
            device: "cpu" or "cuda".
            score_threshold: lowest score, exclusive; None is the one it was exported with.

        Raises:
            ValueError: the file is none that can be used (see `OnnxNetwork`), or was exported with
                a higher threshold.
        """
        network = OnnxNetwork(path, device)
        lowest = network.score_threshold
        if score_threshold is not None and score_threshold < lowest:
            raise ValueError(
                f"score threshold {score_threshold:g}: {path} was exported with {lowest:g} and "
                "holds nothing below; take a higher one, or the checkpoint"
            )
        threshold = lowest if score_threshold is None else score_threshold
        # ONNX Runtime takes its inputs from the CPU and moves them itself.
        return cls(network, network.data, torch.device("cpu"), threshold)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        experiment: Experiment | None = None,
        device: str | torch.device = "cpu",
        score_threshold: float | None = None,
    ) -> Detector:
        """Load a checkpoint of either form.

        Args:
            path: the checkpoint.
            experiment: takes the place of the one stored in it; None takes that.
            device: where the network goes.
            score_threshold: lowest score, exclusive; None is the experiment's.

        Raises:
            CheckpointError: the checkpoint cannot be read, or its weights are not the experiment's.
        """
        if experiment is None:
            experiment = experiment_from_dict(read_checkpoint(path)["experiment"])
        if score_threshold is not None:
            # Boxes below the threshold are dropped before any others are compared with them.
            model = replace(experiment.model, score_threshold=score_threshold)
            experiment = replace(experiment, model=model)
        network = load_detector(path, experiment, device)
        return cls(network, experiment.data, torch.device(device), experiment.model.score_threshold)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.network.classes

    def folded(self) -> Detector:
        """Return the same function in deploy form; an ONNX file's is what was exported."""
        if isinstance(self.network, OnnxNetwork):
            return self
        return replace(self, network=fold_detector(self.network)[0])

    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detect objects, resizing images as in evaluation.

        Args:
            images: (3, H, W) uint8 RGB each; sizes may differ.

        Returns:
            The detections of each image in its own pixels, on the CPU.

        Raises:
            ValueError: an image has another shape or dtype.
        """
        resize = test_transform(self.data)
        batch = collate([resize(_sample(image)) for image in images], keep_difficult=True)
        placed = self.network.detect(batch.images.to(self.device), batch.sizes, batch.scales)
        return [self._above(found) for found in placed]

    def _above(self, found: Detections) -> Detections:
        kept = found.scores > self.score_threshold
        return Detections(
            found.boxes[kept].cpu(), found.scores[kept].cpu(), found.labels[kept].cpu()
        )


def pad_to_size(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Pad a batch (B, 3, H, W) uint8 at the right and bottom to a fixed size; None leaves it.

    Raises:
        ValueError: it is larger.
    """
    height, width = images.shape[-2:]
    if size in (None, (height, width)):
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


_METADATA = ("classes", "size", "score_threshold", "image_size", "keep_ratio", "short_side")


def _first_missing(metadata: dict[str, str]) -> str:
    return next((name for name in _METADATA if name not in metadata), "classes")


def open_session(model: Path | ModelProto, device: str = "cpu", threads: int = 0) -> Any:
    """Return an ONNX Runtime session.

    Args:
        model: a file, or what would be in it.
        device: "cpu" or "cuda".
        threads: of the CPU for one operator; 0 is ONNX Runtime's choice.

    Raises:
        ValueError: there is no such file, or ONNX Runtime is missing, refuses it or has no such
            device.
    """
    if isinstance(model, Path) and not model.is_file():
        raise ValueError(f"{model}: no such file")
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("onnxruntime is missing: pip install 'tinydet[deploy]'") from None
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device, device)
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ValueError(
            f"device {device}: this ONNX Runtime has {', '.join(available)} alone; take device cpu"
            + (", or pip install onnxruntime-gpu" if device == "cuda" else "")
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # A thread that spins takes time from whatever else runs: the other candidates of a timing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's own types, which share no base but this.
        name = model if isinstance(model, Path) else "the network"
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: ONNX Runtime refuses it: {reason}") from error


def _sample(image: Tensor) -> Sample:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"an image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}"
        )
    nothing = torch.zeros(0, dtype=torch.int64)
    size = (image.shape[1], image.shape[2])
    return Sample(image, torch.zeros(0, 4), nothing, nothing.bool(), "", size)
