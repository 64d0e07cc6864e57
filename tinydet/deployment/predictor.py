"""Detect objects in images of any size, with a checkpoint or an ONNX file.

predictor = Predictor.load("best.onnx")
(found,) = predictor([read_image("photo.jpg")])  # boxes in pixels of the photo
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tinydet.config import Data, Experiment
from tinydet.data.loader import collate
from tinydet.data.sample import Sample
from tinydet.data.transforms import test_transform
from tinydet.deployment.fold_checkpoint import fold_detector
from tinydet.deployment.onnx_detector import OnnxDetector
from tinydet.training.checkpoint import load_checkpoint
from tinydet.yolof.decode import Detections
from tinydet.yolof.detection_model import DetectionModel
from tinydet.yolof.detector import Detector


@dataclass(frozen=True)
class Predictor:
    """A detection model with the resizing of its input.

    Attributes:
        model: the detector or ONNX file.
        data: how images are resized for it.
        device: where the model's inputs go.
        score_threshold: detections have a higher score.
    """

    model: DetectionModel
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
        overrides: Sequence[str] = (),
    ) -> Predictor:
        """Load a checkpoint of either form, or an ONNX file if the name ends in .onnx.

        Args:
            path: the file.
            experiment: replaces the one stored in a checkpoint.
            device: "cpu", "cuda", "cuda:N" or "mps".
            score_threshold: lowest score, exclusive; None is the file's own.
            overrides: "a.b=value" for a checkpoint's experiment.

        Raises:
            ValueError: the file cannot be used, or it is an ONNX file that was exported with a
                higher threshold or is combined with `overrides`.
        """
        if Path(path).suffix == ".onnx":
            if overrides:
                raise ValueError(
                    f"--set changes an experiment, and {path} is an ONNX file: export another"
                )
            return _load_onnx(path, device, score_threshold)
        loaded = load_checkpoint(path, experiment, device, overrides)
        detector, data = loaded.detector, loaded.experiment.data
        if score_threshold is not None:
            # Applied before NMS: boxes below the threshold suppress none.
            detector.config = replace(detector.config, score_threshold=score_threshold)
        return cls(detector, data, torch.device(device), detector.config.score_threshold)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.model.classes

    def folded(self) -> Predictor:
        """Return the same function in deploy form; an ONNX file stays as it is."""
        if not isinstance(self.model, Detector):
            return self
        return replace(self, model=fold_detector(self.model)[0])

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
        found = self.model.detect(batch.images.to(self.device), batch.sizes, batch.scales)
        return [self._above_threshold(detections) for detections in found]

    def _above_threshold(self, found: Detections) -> Detections:
        kept = found.scores > self.score_threshold
        return Detections(
            found.boxes[kept].cpu(), found.scores[kept].cpu(), found.labels[kept].cpu()
        )


def _load_onnx(
    path: str | Path, device: str | torch.device, score_threshold: float | None
) -> Predictor:
    model = OnnxDetector(path, device)
    lowest = model.score_threshold
    if score_threshold is not None and score_threshold < lowest:
        raise ValueError(
            f"score threshold {score_threshold:g}: {path} was exported with {lowest:g} and has no "
            "detections below it; use a higher threshold, or the checkpoint"
        )
    threshold = lowest if score_threshold is None else score_threshold
    # ONNX Runtime takes its inputs from the CPU and moves them itself.
    return Predictor(model, model.data, torch.device("cpu"), threshold)


def _sample(image: Tensor) -> Sample:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"an image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}"
        )
    nothing = torch.zeros(0, dtype=torch.int64)
    size = (image.shape[1], image.shape[2])
    return Sample(image, torch.zeros(0, 4), nothing, nothing.bool(), "", size)
