"""The interface of a detector for evaluation and demos, independent of the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tinydet.yolof.decode import Detections


class DetectionModel(Protocol):
    """Detects objects in batches of network inputs.

    Implemented by `yolof.detector.Detector` and `deployment.onnx_detector.OnnxDetector`.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""

    def detect(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> list[Detections]:
        """Detect objects in a batch; see `tinydet.yolof.detector.Detector.detect`."""
