"""The detections of a split in one `.npz` file, read without unpickling anything."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinydet.atomic import replacing
from tinydet.evaluation.boxes import ImageDetections


@dataclass(frozen=True)
class SavedDetections:
    """The detections of a split.

    Attributes:
        image_ids: names of the images.
        classes: class names in label order.
        detections: one for each image, in the same order: float32 boxes and scores, int64 labels.
    """

    image_ids: tuple[str, ...]
    classes: tuple[str, ...]
    detections: list[ImageDetections]

    def same_as(self, other: SavedDetections) -> bool:
        """Return whether both have bit-identical detections of the same images."""
        return (self.image_ids, self.classes) == (other.image_ids, other.classes) and all(
            np.array_equal(a, b)
            for one, two in zip(self.detections, other.detections, strict=True)
            for a, b in zip(one, two, strict=True)
        )


def save_detections(
    path: Path,
    image_ids: Sequence[str],
    classes: Sequence[str],
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Write detections atomically.

    Args:
        path: the file, ending in `.npz`.
        image_ids: names of the images.
        classes: class names in label order.
        detections: one (boxes (N, 4), scores (N,), labels (N,)) for each image.
    """
    found = [ImageDetections(*of_image) for of_image in detections]
    counts = [len(image.scores) for image in found]
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            image_ids=np.array(image_ids, dtype=np.str_),
            classes=np.array(classes, dtype=np.str_),
            counts=np.array(counts, dtype=np.int64),
            boxes=np.concatenate([np.zeros((0, 4)), *(d.boxes for d in found)], dtype=np.float32),
            scores=np.concatenate([np.zeros(0), *(d.scores for d in found)], dtype=np.float32),
            labels=np.concatenate([np.zeros(0, np.int64), *(d.labels for d in found)]),
        )


def load_detections(path: Path) -> SavedDetections:
    """Read a file written by `save_detections`.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("image_ids", "classes", "counts", "boxes", "scores", "labels")
            image_ids, classes, counts, boxes, scores, labels = (file[name] for name in names)
        ends = np.cumsum(counts)[:-1]
        parts = (np.split(values, ends) for values in (boxes, scores, labels))
        found = [ImageDetections(*of_image) for of_image in zip(*parts, strict=True)]
        lengths = {len(boxes), len(scores), len(labels), int(counts.sum())}
        if len(image_ids) != len(counts) or len(lengths) > 1 or boxes.shape[1:] != (4,):
            raise ValueError("its arrays do not match")
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot read detections ({error})") from None
    return SavedDetections(tuple(image_ids.tolist()), tuple(classes.tolist()), found)
