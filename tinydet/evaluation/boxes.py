"""Detections and ground truth of an image, as numpy arrays.

Boxes are xyxy in pixels of the original image, 0-based and continuous: x runs from 0 to the width.
An area is (x2 - x1) * (y2 - y1). The VOC devkit counts inclusive pixels from 1 and adds 1 to each
side. An annotation read as (xmin - 1, ymin - 1, xmax, ymax) has the same area as in the devkit, so
every IoU equals the devkit's for detections written to its files as (x1 + 1, y1 + 1, x2, y2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class ImageDetections(NamedTuple):
    """Detections of one image; any (boxes, scores, labels) tuple is accepted in its place.

    Attributes:
        boxes: (N, 4) xyxy pixels.
        scores: (N,) confidences.
        labels: (N,) integers, indices into the class list.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class GroundTruth:
    """Annotated boxes of one image.

    Attributes:
        boxes: (N, 4) xyxy pixels.
        labels: (N,) integers, indices into the class list.
        difficult: (N,) bool, boxes that need not be found: missing one costs no recall, and a
            detection of one is ignored.
        crowd: (N,) bool, difficult boxes around groups of objects: the COCO metric ignores all
            detections inside. None for no crowds.
        areas: (N,) square pixels, by which the COCO metric separates small from large objects; None
            for the areas of the boxes.
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray | None = None
    areas: np.ndarray | None = None


def check_inputs(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
) -> tuple[list[ImageDetections], list[GroundTruth]]:
    """Validate both and return them as arrays of float64, int64 and bool.

    The optional arrays of the ground truth are filled in, and crowds are marked as difficult.

    Raises:
        ValueError: the lists differ in length, or an image has an array of the wrong shape, a label
            outside [0, num_classes) or a non-finite value.
    """
    if len(detections) != len(ground_truth):
        raise ValueError(
            f"detections of {len(detections)} images for ground truth of {len(ground_truth)}: "
            "give one of each for every image, in the same order"
        )
    checked_detections, checked_truth = [], []
    for index, (found, truth) in enumerate(zip(detections, ground_truth, strict=True)):
        boxes, scores, labels = found
        where = f"detections of image {index}"
        boxes, labels = _check_boxes(boxes, labels, num_classes, where)
        scores = _per_box(scores, np.float64, len(boxes), f"{where}: scores")
        if not np.isfinite(scores).all():
            raise ValueError(f"{where}: a score is not finite; has training diverged?")
        checked_detections.append(ImageDetections(boxes, scores, labels))
        where = f"ground truth of image {index}"
        boxes, labels = _check_boxes(truth.boxes, truth.labels, num_classes, where)
        difficult = _per_box(truth.difficult, bool, len(boxes), f"{where}: difficult")
        crowd = np.zeros_like(difficult) if truth.crowd is None else truth.crowd
        crowd = _per_box(crowd, bool, len(boxes), f"{where}: crowd")
        areas = _areas(boxes) if truth.areas is None else truth.areas
        areas = _per_box(areas, np.float64, len(boxes), f"{where}: areas")
        if not np.isfinite(areas).all():
            raise ValueError(f"{where}: an area is not finite")
        checked_truth.append(GroundTruth(boxes, labels, difficult | crowd, crowd, areas))
    return checked_detections, checked_truth


def _check_boxes(
    boxes: np.ndarray, labels: np.ndarray, num_classes: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.asarray(boxes, np.float64)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{where}: boxes have shape {boxes.shape}, not (N, 4)")
    if not np.isfinite(boxes).all():
        raise ValueError(f"{where}: a box is not finite; has training diverged?")
    labels = _per_box(labels, np.int64, len(boxes), f"{where}: labels")
    if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"{where}: a label is outside 0..{num_classes - 1}")
    return boxes, labels


def _per_box(values: np.ndarray, dtype: type, count: int, where: str) -> np.ndarray:
    values = np.asarray(values).astype(dtype)
    if values.shape != (count,):
        raise ValueError(f"{where} have shape {values.shape} for {count} boxes")
    return values


def pairwise_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the (N, M) intersection over union of xyxy boxes; 0 where both areas are 0."""
    top_left = np.maximum(boxes[:, None, :2], others[None, :, :2])  # (N, M, 2)
    bottom_right = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = np.maximum(bottom_right - top_left, 0.0)
    overlap = sides[..., 0] * sides[..., 1]  # (N, M)
    union = _areas(boxes)[:, None] + _areas(others)[None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
