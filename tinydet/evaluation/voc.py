"""Average precision as in PASCAL VOC: the devkits of 2007 (11-point) and 2010 (area)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, ImageDetections, check_inputs, pairwise_iou

# Outcomes of a detection, see `match_voc`.
TRUE_POSITIVE, FALSE_POSITIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class VocResult:
    """Average precision of every class, as fractions.

    A class without ground truth (difficult boxes do not count) is NaN and excluded from the means;
    a mean over no classes is NaN.

    Attributes:
        ap_area: (K,) area under the monotone precision-recall curve (VOC 2010 and later).
        ap_11pt: (K,) mean of 11 interpolated precisions (VOC 2007).
        num_boxes: (K,) number of ground-truth boxes, difficult ones excluded.
        true_positives: K arrays: the number of true positives among the class's first 1..N
            detections by descending score. Input of `interpolated_precision`.
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

    The detections of a class are processed by descending score over all images (equal scores: in
    input order). Each is assigned to the box of its class with the highest IoU (equal IoU: the
    first box). Below `iou` it is a false positive; if the box is difficult, the detection is
    ignored; if the box already has a detection, it is a false positive, even if it also overlaps a
    second, free box; otherwise it is a true positive. An IoU of exactly `iou` is a match (`>=` in
    the devkit).

    Args:
        detections: one (boxes (N, 4), scores (N,), labels (N,)) for each image, as in `boxes.py`.
        ground_truth: one for each image, in the same order.
        num_classes: number of classes K.
        iou: lowest IoU of a true positive.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    found, truth = check_inputs(detections, ground_truth, num_classes)
    outcome, _ = match_voc(found, truth, iou)
    scores = np.concatenate([image.scores for image in found] or [np.zeros(0)])
    labels = np.concatenate([image.labels for image in found] or [np.zeros(0, np.int64)])
    counted = [image.labels[~image.difficult] for image in truth] or [np.zeros(0, np.int64)]
    num_boxes = np.bincount(np.concatenate(counted), minlength=num_classes)

    ap_area, ap_11pt = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    true_positives = [np.zeros(0, np.int64)] * num_classes
    for label in np.flatnonzero(num_boxes):
        # Dropping a detection is equivalent to the devkit's tp = fp = 0.
        rows = np.flatnonzero((labels == label) & (outcome != IGNORED))
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        true_positives[label] = np.cumsum(outcome[rows] == TRUE_POSITIVE)
        ap_area[label] = area_ap(true_positives[label], int(num_boxes[label]))
        ap_11pt[label] = eleven_point_ap(true_positives[label], int(num_boxes[label]))
    return VocResult(ap_area, ap_11pt, num_boxes, tuple(true_positives))


def match_voc(
    found: Sequence[ImageDetections], truth: Sequence[GroundTruth], iou: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Classify each detection as true positive, false positive or ignored, as `evaluate_voc` does.

    Args:
        found: detections of each image, checked by `check_inputs`.
        truth: ground truth of each image, checked as well.
        iou: lowest IoU of a true positive.

    Returns:
        For the N detections of all images in order: (N,) TRUE_POSITIVE, FALSE_POSITIVE or IGNORED,
        and (N,) the index, over the boxes of all images, of the box each is assigned to. The index
        of a false positive is undefined.
    """
    best_iou, best_box, on_difficult = _best_boxes(found, truth)
    scores = np.concatenate([image.scores for image in found] or [np.zeros(0)])
    order = np.argsort(-scores, kind="stable")
    outcome = np.full(len(scores), FALSE_POSITIVE)
    hit = best_iou >= iou
    outcome[hit & on_difficult] = IGNORED
    # A box has one class and one image, so sorting all detections together gives the same first
    # detection for each box as sorting each class alone.
    hits = order[(hit & ~on_difficult)[order]]
    outcome[hits[np.unique(best_box[hits], return_index=True)[1]]] = TRUE_POSITIVE
    return outcome, best_box


def _best_boxes(
    found: Sequence[ImageDetections], truth: Sequence[GroundTruth]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the box of its own class that each detection overlaps most.

    Returns:
        For all detections in order: the IoU (-1 where the image has no box of the class), the
        box's index over all images, and whether it is difficult.
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
        true_positives: (N,) number of true positives among the first 1..N detections by
            descending score.
        num_boxes: number of ground-truth boxes, at least 1.
    """
    steps = np.diff(true_positives, prepend=0)  # recall rises by 1 / num_boxes at each 1
    return float((_monotone_precision(true_positives) * steps).sum() / num_boxes)


def eleven_point_ap(true_positives: np.ndarray, num_boxes: int) -> float:
    """Return the mean over recalls 0, 0.1, ... 1 of the highest precision at that recall or above.

    Arguments as in `area_ap`.
    """
    return float(interpolated_precision(true_positives, num_boxes)[::10].mean())


def interpolated_precision(true_positives: np.ndarray, num_boxes: int) -> np.ndarray:
    """Return the precision-recall curve made monotone, as (101,) precisions.

    Element k is the highest precision at recall k / 100 or above, 0 if that recall is not reached.
    Recalls are compared as integers (100 tp >= k boxes), so that 3 of 10 boxes have a recall of
    exactly 0.3. Arguments as in `area_ap`.
    """
    precision = np.append(_monotone_precision(true_positives), 0.0)
    return precision[np.searchsorted(100 * true_positives, np.arange(101) * num_boxes)]


def _monotone_precision(true_positives: np.ndarray) -> np.ndarray:
    """Return for n = 1..N the highest precision of the first n detections or more, (N,)."""
    precision = true_positives / np.arange(1, len(true_positives) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1]
