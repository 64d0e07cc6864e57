"""What a predictor found in an image, in the forms that other tools read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tinydet.atomic import write_text
from tinydet.data.annotation import annotation_xml
from tinydet.report.draw import draw_detections, encode_jpeg, save_image


@dataclass(frozen=True, eq=False)
class Prediction:
    """The objects found in one image, by descending score.

    It is also a mapping of "boxes", "scores" and "labels", which is what torchvision's detectors
    return and torchmetrics takes, and supervision with
    `Detections.from_transformers(prediction, id2label=dict(enumerate(prediction.classes)))`.
    As the last value of a notebook's cell it shows itself.

    Attributes:
        boxes: (N, 4) float32 xyxy, in pixels of the image.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, indices into `classes`.
        classes: class names in label order.
        image: (3, H, W) uint8 RGB.
        file: name of the image's file; empty if it has none.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    image: Tensor
    file: str = ""

    @property
    def names(self) -> list[str]:
        """Class name of each object."""
        return [self.classes[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).items())
        return f"Prediction({counts or 'nothing'}{f' in {self.file}' if self.file else ''})"

    def keys(self) -> tuple[str, ...]:
        """Return the names of the mapping's values."""
        return ("boxes", "scores", "labels")

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.keys():
            raise KeyError(key)
        value: Tensor = getattr(self, key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def to_coco(
        self, image_id: int = 0, category_ids: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Return the objects as entries of a COCO results file (`COCO.loadRes`).

        Args:
            image_id: id of the image in the data set.
            category_ids: of the class names; the default is `labels` + 1, as in the files of
                `tools/convert.py`. COCO's own ids have holes: take them from its categories.
        """
        ids = category_ids or {name: number for number, name in enumerate(self.classes, 1)}
        return [
            {
                "image_id": image_id,
                "category_id": ids[name],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for name, (x1, y1, x2, y2), score in zip(
                self.names, self.boxes.tolist(), self.scores.tolist(), strict=True
            )
        ]

    def to_voc(self) -> str:
        """Return the objects as a VOC annotation, without scores: a start for labelling by hand."""
        height, width = self.image.shape[1:]
        sides = [
            (*_voc_side(x1, x2, width), *_voc_side(y1, y2, height))
            for x1, y1, x2, y2 in self.boxes.tolist()
        ]
        boxes = [(left, top, right, bottom) for left, right, top, bottom in sides]
        objects = zip(self.names, boxes, [False] * len(self), strict=True)
        return annotation_xml(self.file, (height, width), objects).decode()

    def draw(self) -> Tensor:
        """Return the image with the objects drawn, (3, H, W) uint8 RGB."""
        return draw_detections(self.image, self.boxes, self.labels, self.scores, self.classes)

    def save(self, path: str | Path) -> None:
        """Write the drawing, or with the ending .xml the VOC annotation, atomically.

        Raises:
            ValueError: the ending is not .xml or one of an image format.
        """
        if Path(path).suffix.lower() == ".xml":
            write_text(Path(path), self.to_voc())
        else:
            save_image(self.draw(), path)

    def _repr_jpeg_(self) -> bytes:
        return encode_jpeg(self.draw())


def _voc_side(low: float, high: float, length: int) -> tuple[float, float]:
    """Return the first and the last pixel of a side, from 1: at least one pixel of the image."""
    if high - low < 1:
        low = min(max((low + high - 1) / 2, 0.0), length - 1.0)
        high = low + 1
    return low + 1, high
