"""Average precision where each image counts as often as its weight says.

A bootstrap over images asks for the metric of thousands of test sets in which some images are there
several times and others not at all. Which box a detection belongs to is a matter of its own image:
all images are matched once, and a test set is then a vector of weights. The average precision
is that of the metric itself with each image repeated (copies behind one another), for all classes
that the test set has boxes of. A weight need not be whole: of 2.5 copies the last is half a one.

The metrics take detections of equal scores in the order of the images and, in an image, in the
order given. Where an image has several at one score, its copies are therefore counted one by one:
right, wrong, right, wrong is less precise than right, right, wrong, wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, check_inputs
from tinydet.evaluation.coco import ClassMatches
from tinydet.evaluation.voc import IGNORED, RIGHT, match

_CHUNK = 32  # test sets at a time: what is computed of them stays in the processor's cache
_RECALLS = np.linspace(0.0, 1.0, 101)  # pycocotools'
# From true positives and precisions (R, P) and boxes (R, 1) to average precisions (R,).
_Rule = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def voc_matches(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    iou: float = 0.5,
) -> list[ClassMatches]:
    """Judge detections as `evaluate_voc` does, at one threshold; arguments and errors as there."""
    found, truth = check_inputs(detections, ground_truth, num_classes)
    outcome, _ = match(found, truth, iou)
    scores = np.concatenate([np.zeros(0), *(image.scores for image in found)])
    labels = np.concatenate([np.zeros(0, np.int64), *(image.labels for image in found)])
    images = np.repeat(np.arange(len(found)), [len(image.labels) for image in found])
    boxes = np.zeros((num_classes, len(truth)))
    for i, image in enumerate(truth):
        np.add.at(boxes[:, i], image.labels[~image.difficult], 1)
    matches = []
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        judged = outcome[rows][None]
        matches.append(
            ClassMatches(
                images[rows], scores[rows], judged == RIGHT, judged == IGNORED, boxes[label]
            )
        )
    return matches


def weighted_area_ap(matches: Sequence[ClassMatches], weights: np.ndarray) -> np.ndarray:
    """Return the mean area under the precision-recall curves (VOC 2010), as `mean_area` is.

    Args:
        matches: of `voc_matches`, a class each.
        weights: (R, I), at least 0, how often each image is in each of R test sets.

    Returns:
        (R,) float64; NaN for a test set without boxes to find.
    """
    return _over_classes(matches, weights, _area)


def weighted_coco_ap(matches: Sequence[ClassMatches], weights: np.ndarray) -> np.ndarray:
    """Return COCO's mean of 101 precisions, over thresholds and classes, as `CocoResult.ap` is.

    Args:
        matches: of `match_coco`, a class each.
        weights: (R, I), at least 0, how often each image is in each of R test sets.

    Returns:
        (R,) float64; NaN for a test set without boxes to find.
    """
    return _over_classes(matches, weights, _at_recalls)


def _over_classes(matches: Sequence[ClassMatches], weights: np.ndarray, rule: _Rule) -> np.ndarray:
    total, known = np.zeros(len(weights)), np.zeros(len(weights))
    for start in range(0, len(weights), _CHUNK):
        rows = slice(start, start + _CHUNK)
        chunk = np.asarray(weights[rows], np.float64)
        for of_class in matches:
            num_boxes = chunk @ of_class.boxes  # (R,)
            there = num_boxes > 0
            num_boxes = np.where(there, num_boxes, 1.0)[:, None]
            curves = [rule(*curve, num_boxes) for curve in _curves(of_class, chunk)]
            total[rows] += np.where(there, np.mean(curves, axis=0), 0.0)
            known[rows] += there
    return np.divide(total, known, out=np.full(len(weights), np.nan), where=known > 0)


def _curves(matches: ClassMatches, weights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each threshold what there is at its P true positives, by descending score.

    Yields:
        (R, P) true positives so far, and the best precision from there on. Between two true
        positives precision only falls, so no other place is asked for.
    """
    rows, of_detection = _copies(matches, weights)  # (N,), (R, N)
    so_far = np.cumsum(of_detection, axis=1)
    for right, ignored in zip(matches.right[:, rows], matches.ignored[:, rows], strict=True):
        places = np.flatnonzero(right)
        counted = so_far[:, places]
        if ignored.any():
            left_out = np.flatnonzero(ignored)
            sums = np.cumsum(of_detection[:, left_out], axis=1)
            sums = np.concatenate([np.zeros((len(weights), 1)), sums], axis=1)
            counted = counted - sums[:, np.searchsorted(left_out, places)]
        found = np.cumsum(of_detection[:, places], axis=1)
        # Images of weight 0 at the very beginning: 0 of 0 are right.
        precision = np.divide(found, counted, out=np.zeros_like(found), where=counted > 0)
        yield found, np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def _copies(matches: ClassMatches, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order in which detections count, and how often each one does.

    Returns:
        (N',) positions in `matches`: each once, but detections of one image with one score once
        for each of its copies, those of a copy together. (R, N') weights of them.
    """
    images, scores = matches.images, matches.scores
    same = (images[1:] == images[:-1]) & (scores[1:] == scores[:-1])  # as the one before
    if not same.any():
        return np.arange(len(images)), weights[:, images]
    tied = np.append(same, False) | np.append(False, same)
    copies = np.where(tied, np.ceil(weights.max(axis=0))[images], 1).astype(np.intp)
    rows = np.repeat(np.arange(len(images)), copies)
    copy = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
    group = np.cumsum(np.append(True, ~same))
    order = np.lexsort((rows, copy, group[rows]))
    rows, copy = rows[order], copy[order]
    return rows, np.clip(weights[:, images[rows]] - copy, 0.0, np.where(tied[rows], 1.0, np.inf))


def _area(found: np.ndarray, precision: np.ndarray, num_boxes: np.ndarray) -> np.ndarray:
    steps = np.diff(found, axis=1, prepend=0.0)
    return (steps * precision).sum(axis=1) / num_boxes[:, 0]


def _at_recalls(found: np.ndarray, precision: np.ndarray, num_boxes: np.ndarray) -> np.ndarray:
    # A recall threshold takes the precision of the first true positive that reaches it. How many
    # thresholds each one reaches, in the floating point that pycocotools compares them in:
    recall = found / num_boxes
    nearest = np.rint(recall * 100).astype(np.intp)
    reached = nearest + (_RECALLS[nearest] <= recall)
    return (np.diff(reached, axis=1, prepend=0) * precision).sum(axis=1) / len(_RECALLS)
