"""The interface of a detector for evaluation and demos, independent of the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tinydet.yolof.decode import Detections


class Network(Protocol):
    """A network that detects objects, such as `Detector` or `deployment.runtime.OnnxNetwork`.

    Attributes:
        classes: class names in label order.
    """

    classes: tuple[str, ...]

    def detect(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> list[Detections]:
        """Detect objects in a batch; see `tinydet.yolof.detector.Detector.detect`."""
