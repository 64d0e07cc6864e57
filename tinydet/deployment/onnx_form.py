"""An ONNX detector cut in two, so that the network and the selection are timed on their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto
from onnx.utils import Extractor
from torch import Tensor

from tinydet.deployment.onnx import RAW
from tinydet.deployment.runtime import OUTPUTS, open_session

_BETWEEN = list(RAW)


class OnnxForm:
    """Runs an exported file like a detector: `form(images)`, then `form.select(...)`."""

    def __init__(self, model: ModelProto | Path, threads: int = 0, device: str = "cpu") -> None:
        """Cut and load.

        Args:
            model: what `deploy/export_onnx.py` or `deploy/quantize.py` writes, or the file.
            threads: of the CPU for one operator; 0 is ONNX Runtime's choice.
            device: "cpu" or "cuda".

        Raises:
            ValueError: there is no such file, it is none of these, or ONNX Runtime refuses it.
        """
        if isinstance(model, Path):
            if not model.is_file():
                raise ValueError(f"{model}: no such file")
            model = onnx.load(model)
        names = {output.name for output in model.graph.output}
        if not names >= set(OUTPUTS):
            raise ValueError(
                "the ONNX file selects no detections: export it with deploy/export_onnx.py, and "
                "without --no-nms"
            )
        self._network = open_session(_part(model, ["images"], _BETWEEN), device, threads)
        self._selection = open_session(_part(model, _BETWEEN, OUTPUTS), device, threads)

    def __call__(self, images: Tensor) -> tuple[Any, Any]:
        """Return every anchor's scores and box.

        Args:
            images: (B, 3, H, W) uint8 RGB on the CPU.
        """
        scores, boxes = self._network.run(_BETWEEN, {"images": images.numpy()})
        return scores, boxes

    def select(self, scores: Any, boxes: Any, image_size: tuple[int, int]) -> list[Any]:
        """Select detections; the graph has clipped the boxes to `image_size` already."""
        del image_size
        return self._selection.run(OUTPUTS, dict(zip(_BETWEEN, (scores, boxes), strict=True)))


def _part(model: ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
    part = Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(
        list(inputs), list(outputs)
    )
    part.ir_version = model.ir_version
    return part
