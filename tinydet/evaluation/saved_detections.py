"""Detections of a whole split in one file: arrays and names, nothing that can run code."""

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
    """What a detector found in a split.

    Attributes:
        image_ids: names of the images.
        classes: class names in label order.
        detections: one an image, in the same order: float32 boxes and scores, int64 labels.
    """

    image_ids: tuple[str, ...]
    classes: tuple[str, ...]
    detections: list[ImageDetections]

    def same_as(self, other: SavedDetections) -> bool:
        """Whether both hold the same detections of the same images, to the last bit."""
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
    """Write detections, whole or not at all.

    Args:
        path: the file, ending in `.npz`.
        image_ids: names of the images.
        classes: class names in label order.
        detections: one (boxes (N, 4), scores (N,), labels (N,)) an image.
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
    """Read a file of `save_detections`.

    Raises:
        ValueError: it is missing, damaged or no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("image_ids", "classes", "counts", "boxes", "scores", "labels")
            image_ids, classes, counts, boxes, scores, labels = (file[name] for name in names)
        ends = np.cumsum(counts)[:-1]
        parts = (np.split(values, ends) for values in (boxes, scores, labels))
        found = [ImageDetections(*of_image) for of_image in zip(*parts, strict=True)]
        if len(image_ids) != len(counts) or not counts.sum() == len(boxes) == len(scores):
            raise ValueError("its parts do not fit together")
        if len(labels) != len(boxes) or boxes.shape[1:] != (4,):
            raise ValueError("its parts do not fit together")
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no detections can be read from it ({error})") from None
    return SavedDetections(tuple(image_ids.tolist()), tuple(classes.tolist()), found)
