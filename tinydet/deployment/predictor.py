"""Detect objects in images of any kind and size, with a checkpoint or an ONNX file.

predictor = Predictor("best.pt")
found = predictor("photo.jpg")  # boxes in pixels of the photo
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tinydet.config import Data, Experiment
from tinydet.data.image import find_images, is_deep, read_image
from tinydet.data.loader import collate
from tinydet.data.sample import Sample
from tinydet.data.sampler import TestBatches
from tinydet.data.transforms import padded_size, test_transform
from tinydet.deployment.fold_checkpoint import fold_detector
from tinydet.deployment.onnx_detector import OnnxDetector
from tinydet.deployment.prediction import Prediction
from tinydet.training.checkpoint import load_checkpoint
from tinydet.yolof.decode import Detections
from tinydet.yolof.detection_model import DetectionModel
from tinydet.yolof.detector import Detector

ImageLike = str | Path | np.ndarray | Image.Image | Tensor


class Predictor:
    """A detector with the reading and resizing of its images.

    Args:
        path: a checkpoint of either form, or an ONNX file if the name ends in .onnx.
        experiment: replaces the one stored in a checkpoint.
        device: "cpu", "cuda", "cuda:N" or "mps".
        score_threshold: lowest score, exclusive; None is the file's own.
        overrides: "a.b=value" for a checkpoint's experiment.

    Attributes:
        model: the detector or ONNX file.
        data: how images are resized for it.
        device: where the model's inputs go.
        score_threshold: detections have a higher score.

    Raises:
        ValueError: the file cannot be used, or it is an ONNX file that was exported with a higher
            threshold or is combined with `overrides`.
    """

    def __init__(
        self,
        path: str | Path,
        experiment: Experiment | None = None,
        device: str | torch.device = "cpu",
        score_threshold: float | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        if Path(path).suffix == ".onnx":
            if overrides:
                raise ValueError(
                    f"--set changes an experiment, and {path} is an ONNX file: export another"
                )
            model = OnnxDetector(path, device)
            threshold = _threshold_of(model, path, score_threshold)
            # ONNX Runtime takes its inputs from the CPU and moves them itself.
            self._set(model, model.data, torch.device("cpu"), threshold)
            return
        loaded = load_checkpoint(path, experiment, device, overrides)
        detector, data = loaded.detector, loaded.experiment.data
        if score_threshold is not None:
            # Applied before NMS: boxes below the threshold suppress none.
            detector.config = replace(detector.config, score_threshold=score_threshold)
        self._set(detector, data, torch.device(device), detector.config.score_threshold)

    @classmethod
    def of(
        cls, model: DetectionModel, data: Data, device: torch.device, score_threshold: float
    ) -> Predictor:
        """Return the predictor of a model in memory; see the attributes."""
        self = cls.__new__(cls)
        self._set(model, data, device, score_threshold)
        return self

    def _set(
        self, model: DetectionModel, data: Data, device: torch.device, score_threshold: float
    ) -> None:
        self.model, self.data = model, data
        self.device, self.score_threshold = device, score_threshold

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.model.classes

    def folded(self) -> Predictor:
        """Return the same function in deploy form; an ONNX file stays as it is."""
        if not isinstance(self.model, Detector):
            return self
        folded = fold_detector(self.model)[0]
        return Predictor.of(folded, self.data, self.device, self.score_threshold)

    # A path, an array and a tensor are iterables too, hence the first two.
    @overload
    def __call__(self, images: ImageLike, batch_size: int = ...) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, images: Iterator[ImageLike], batch_size: int = ...
    ) -> Iterator[Prediction]: ...

    @overload
    def __call__(self, images: Iterable[ImageLike], batch_size: int = ...) -> list[Prediction]: ...

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = 8
    ) -> Prediction | Iterator[Prediction] | list[Prediction]:
        """Detect objects, resizing images as in evaluation.

        Args:
            images: one image, or an iterable of images of any sizes. An image is the path of a
                file, an (H, W, 3) or (H, W) uint8 array in RGB (OpenCV's are BGR: turn them with
                `array[..., ::-1]`), a PIL image or a (3, H, W) uint8 RGB tensor. Files and PIL
                images are turned by their EXIF orientation.
            batch_size: most images that go through the network together: those of a batch that
                have the same padded shape.

        Returns:
            What was found, in pixels of the image and on the CPU: for one image a `Prediction`; for
            a generator or another iterator an iterator, which reads as it goes; else a list. The
            path of a folder and a pattern ("photos/*.jpg") stand for the list of their images.

        Raises:
            ValueError: an image cannot be read, or has another shape or dtype; or batch_size is not
                positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if isinstance(images, Iterator):
            return self._stream(images, batch_size)
        if isinstance(images, (str, Path)) and not Path(images).is_file():
            return list(self._stream(find_images([Path(images)]), batch_size))
        is_one = isinstance(images, (str, Path, Image.Image)) or not isinstance(images, Iterable)
        if is_one or getattr(images, "ndim", 4) < 4:
            return next(self._stream([images], 1))  # type: ignore[list-item]
        return list(self._stream(images, batch_size))  # type: ignore[arg-type]

    def _stream(self, images: Iterable[ImageLike], batch_size: int) -> Iterator[Prediction]:
        resize = test_transform(self.data)
        iterator = iter(images)
        while batch := list(islice(iterator, batch_size)):
            pixels = [_pixels(image) for image in batch]
            samples = [resize(_sample(image)) for image in pixels]
            shapes = [padded_size((s.image.shape[-2], s.image.shape[-1])) for s in samples]
            found: dict[int, Detections] = {}
            # As in evaluation: more padding than an image has alone would change what is found.
            for group in TestBatches(shapes, batch_size):
                inputs = collate([samples[i] for i in group], keep_difficult=True)
                images_in = inputs.images.to(self.device)
                results = self.model.detect(images_in, inputs.sizes, inputs.scales)
                found.update(zip(group, results, strict=True))
            for i, (image, rgb) in enumerate(zip(batch, pixels, strict=True)):
                detections = found[i]
                kept = detections.scores > self.score_threshold
                yield Prediction(
                    detections.boxes[kept].cpu(),
                    detections.scores[kept].cpu(),
                    detections.labels[kept].cpu(),
                    self.classes,
                    rgb,
                    Path(image).name if isinstance(image, (str, Path)) else "",
                )


def _threshold_of(model: OnnxDetector, path: str | Path, score_threshold: float | None) -> float:
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ValueError(f"score threshold {score_threshold:g}: must be from 0 to 1")
    lowest = model.score_threshold
    if score_threshold is not None and score_threshold < lowest:
        raise ValueError(
            f"score threshold {score_threshold:g}: {path} was exported with {lowest:g} and has no "
            "detections below it; use a higher threshold, or the checkpoint"
        )
    return lowest if score_threshold is None else score_threshold


def _pixels(image: ImageLike) -> Tensor:
    """Return an image as (3, H, W) uint8 RGB."""
    if isinstance(image, (str, Path)):
        return read_image(Path(image), orientation=True)
    if isinstance(image, Image.Image):
        if is_deep(image):
            raise ValueError(
                f"a PIL image of mode {image.mode} has more than 8 bits; give its file's path"
            )
        image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"an array must be uint8 (H, W, 3) or (H, W), not {image.dtype} {image.shape}"
            )
        channels = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        # A copy in the order of a tensor's: OpenCV's, turned, has negative strides.
        image = torch.from_numpy(np.ascontiguousarray(channels.transpose(2, 0, 1)))
    if not isinstance(image, Tensor):
        raise ValueError(
            "an image is a path, an array, a PIL image or a tensor, not of type "
            f"{type(image).__name__}"
        )
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(
            f"an image must be uint8 (3, H, W) and not empty, not {image.dtype} "
            f"{tuple(image.shape)}"
        )
    return image.cpu()


def _sample(image: Tensor) -> Sample:
    nothing = torch.zeros(0, dtype=torch.int64)
    size = (image.shape[1], image.shape[2])
    return Sample(image, torch.zeros(0, 4), nothing, nothing.bool(), "", size)
