"""Average precision as in PASCAL VOC: the devkits of 2007 (11-point) and 2010 (area)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, ImageDetections, check_inputs, pairwise_iou

# What a detection is, see `match`.
RIGHT, WRONG, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class VocResult:
    """Average precision of every class, as fractions.

    A class without ground truth (difficult boxes do not count) is NaN and left out of the means;
    a mean over no class is NaN.

    Attributes:
        ap_area: (K,) area under the monotone precision-recall curve (VOC 2010 and later).
        ap_11pt: (K,) mean of 11 interpolated precisions (VOC 2007).
        num_boxes: (K,) boxes that count, i.e. not difficult.
        true_positives: K arrays; how many of the class's first 1..N detections, by descending
            score, are right. `interpolated_precision` makes a curve of it.
    """

    ap_area: np.ndarray
    ap_11pt: np.ndarray
    num_boxes: np.ndarray
    true_positives: tuple[np.ndarray, ...]

    @property
    def mean_area(self) -> float:
        """Mean of `ap_area` over the classes with ground truth."""
        return _mean(self.ap_area)

    @property
    def mean_11pt(self) -> float:
        """Mean of `ap_11pt` over the classes with ground truth."""
        return _mean(self.ap_11pt)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def evaluate_voc(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    iou: float = 0.5,
) -> VocResult:
    """Match detections to ground truth as the VOC devkit does and return the average precisions.

    Detections of a class are taken by descending score over all images (equal scores: in the order
    given). Each one belongs to the box of its class it overlaps most (equal IoU: the first box).
    Below `iou` it is a false positive; if that box is difficult the detection does not count; if
    the box already has a detection it is a false positive, even where a second box would have
    fitted; else it is a true positive. An IoU of exactly `iou` is enough (`>=` in the devkit).

    Args:
        detections: one (boxes (N, 4), scores (N,), labels (N,)) an image, as in `boxes.py`.
        ground_truth: one an image, in the same order.
        num_classes: number of classes K.
        iou: smallest intersection over union of a true positive.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    found, truth = check_inputs(detections, ground_truth, num_classes)
    outcome, _ = match(found, truth, iou)
    scores = np.concatenate([image.scores for image in found] or [np.zeros(0)])
    labels = np.concatenate([image.labels for image in found] or [np.zeros(0, np.int64)])
    counted = [image.labels[~image.difficult] for image in truth] or [np.zeros(0, np.int64)]
    num_boxes = np.bincount(np.concatenate(counted), minlength=num_classes)

    ap_area, ap_11pt = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    true_positives = [np.zeros(0, np.int64)] * num_classes
    for label in np.flatnonzero(num_boxes):
        # Leaving a detection out is what the devkit's tp = fp = 0 amounts to.
        rows = np.flatnonzero((labels == label) & (outcome != IGNORED))
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        true_positives[label] = np.cumsum(outcome[rows] == RIGHT)
        ap_area[label] = area_ap(true_positives[label], int(num_boxes[label]))
        ap_11pt[label] = eleven_point_ap(true_positives[label], int(num_boxes[label]))
    return VocResult(ap_area, ap_11pt, num_boxes, tuple(true_positives))


def match(
    found: Sequence[ImageDetections], truth: Sequence[GroundTruth], iou: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Judge each detection by the rule of `evaluate_voc`.

    Args:
        found: detections of each image, checked by `check_inputs`.
        truth: ground truth of each image, checked as well.
        iou: smallest intersection over union of a true positive.

    Returns:
        For the N detections of all images in order: (N,) RIGHT, WRONG or IGNORED, and (N,) the
        number of the box each belongs to, counted over all images; it says nothing of a wrong one.
    """
    best_iou, best_box, on_difficult = _best_boxes(found, truth)
    scores = np.concatenate([image.scores for image in found] or [np.zeros(0)])
    order = np.argsort(-scores, kind="stable")
    outcome = np.full(len(scores), WRONG)
    hit = best_iou >= iou
    outcome[hit & on_difficult] = IGNORED
    # A box is of one class and image: its first detection by score is the same over all of them.
    hits = order[(hit & ~on_difficult)[order]]
    outcome[hits[np.unique(best_box[hits], return_index=True)[1]]] = RIGHT
    return outcome, best_box


def _best_boxes(
    found: Sequence[ImageDetections], truth: Sequence[GroundTruth]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the box of its class that each detection overlaps most.

    Returns:
        For all detections in order: the IoU (-1 where the image has no box of the class), the
        box's number over all images, and whether it is difficult.
    """
    ious, boxes, difficult = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    offset = 0
    for image, annotated in zip(found, truth, strict=True):
        count = len(image.labels)
        if count and len(annotated.labels):
            overlap = pairwise_iou(image.boxes, annotated.boxes)  # (N, G)
            overlap[image.labels[:, None] != annotated.labels[None]] = -1
            best = overlap.argmax(axis=1)
            ious.append(overlap[np.arange(count), best])
            boxes.append(best + offset)
            difficult.append(annotated.difficult[best])
        else:
            ious.append(np.full(count, -1.0))
            boxes.append(np.zeros(count, np.int64))
            difficult.append(np.zeros(count, bool))
        offset += len(annotated.labels)
    return np.concatenate(ious), np.concatenate(boxes), np.concatenate(difficult)


def area_ap(true_positives: np.ndarray, num_boxes: int) -> float:
    """Return the area under the precision-recall curve made monotone (VOC 2010 devkit's VOCap.m).

    Args:
        true_positives: (N,) how many of the first 1..N detections, by descending score, are right.
        num_boxes: boxes to find, at least 1.
    """
    steps = np.diff(true_positives, prepend=0)  # recall rises by 1 / num_boxes at each 1
    return float((_monotone_precision(true_positives) * steps).sum() / num_boxes)


def eleven_point_ap(true_positives: np.ndarray, num_boxes: int) -> float:
    """Return the mean over recalls 0, 0.1, ... 1 of the best precision at that recall or beyond.

    Arguments as in `area_ap`.
    """
    return float(interpolated_precision(true_positives, num_boxes)[::10].mean())


def interpolated_precision(true_positives: np.ndarray, num_boxes: int) -> np.ndarray:
    """Return the precision-recall curve made monotone, as (101,) precisions.

    They are the best at recalls 0, 0.01, ... 1 or beyond, and 0 where a recall is never reached.
    Recalls are compared as whole numbers (100 tp >= k boxes): 3 of 10 boxes are a recall of 0.3,
    whatever 0.3 is in floating point. Arguments as in `area_ap`.
    """
    precision = np.append(_monotone_precision(true_positives), 0.0)
    return precision[np.searchsorted(100 * true_positives, np.arange(101) * num_boxes)]


def _monotone_precision(true_positives: np.ndarray) -> np.ndarray:
    """Return the (N,) best precisions of the first n detections or more, n in 1..N."""
    precision = true_positives / np.arange(1, len(true_positives) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1]
