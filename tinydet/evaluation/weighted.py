"""Average precision with a weight for each image, for bootstrapping over images.

A bootstrap evaluates thousands of test sets in which some images occur several times and others not
at all. Detections are matched within their image, so matching is done once, and a test set is a
vector of image weights. The result equals the metric on a test set in which each image is repeated
(copies next to each other), averaged over the classes that have boxes in it. Weights need not be
integers: with a weight of 2.5 the third copy counts half.

The metrics order detections of equal score by image and, within an image, by input order. If an
image has several detections of one score, its copies must therefore be counted one by one: the
precision of TP, FP, TP, FP differs from that of TP, TP, FP, FP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, check_inputs
from tinydet.evaluation.coco import ClassMatches
from tinydet.evaluation.voc import IGNORED, TRUE_POSITIVE, match_voc
from tinydet.progress import Progress

_CHUNK = 32  # test sets at a time, so that intermediate arrays fit in the CPU cache
_RECALLS = np.linspace(0.0, 1.0, 101)  # pycocotools'
# (true positives (R, P), precisions (R, P), number of boxes (R, 1)) -> average precisions (R,).
_Rule = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def voc_matches(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    iou: float = 0.5,
) -> list[ClassMatches]:
    """Match detections as `evaluate_voc` does; same arguments and errors."""
    found, truth = check_inputs(detections, ground_truth, num_classes)
    outcome, _ = match_voc(found, truth, iou)
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
        matched = outcome[rows][None]
        matches.append(
            ClassMatches(
                images[rows],
                scores[rows],
                matched == TRUE_POSITIVE,
                matched == IGNORED,
                boxes[label],
            )
        )
    return matches


def weighted_area_ap(matches: Sequence[ClassMatches], weights: np.ndarray) -> np.ndarray:
    """Return the mean area under the precision-recall curves (VOC 2010), as `mean_area` is.

    Args:
        matches: from `voc_matches`, one for each class.
        weights: (R, I), non-negative, the number of copies of each image in each of R test sets.

    Returns:
        (R,) float64; NaN for a test set without ground-truth boxes.
    """
    return _mean_over_classes(matches, weights, _area)


def weighted_coco_ap(matches: Sequence[ClassMatches], weights: np.ndarray) -> np.ndarray:
    """Return COCO's mean of 101 precisions, over thresholds and classes, as `CocoResult.ap` is.

    Args:
        matches: from `match_coco`, one for each class.
        weights: (R, I), non-negative, the number of copies of each image in each of R test sets.

    Returns:
        (R,) float64; NaN for a test set without ground-truth boxes.
    """
    return _mean_over_classes(matches, weights, _at_recalls)


def _mean_over_classes(
    matches: Sequence[ClassMatches], weights: np.ndarray, rule: _Rule
) -> np.ndarray:
    total, known = np.zeros(len(weights)), np.zeros(len(weights))
    with Progress("evaluating resampled test sets", len(weights), "sets") as progress:
        for start in range(0, len(weights), _CHUNK):
            rows = slice(start, start + _CHUNK)
            chunk = np.asarray(weights[rows], np.float64)
            for class_matches in matches:
                num_boxes = chunk @ class_matches.boxes  # (R,)
                has_boxes = num_boxes > 0
                num_boxes = np.where(has_boxes, num_boxes, 1.0)[:, None]
                curves = [rule(*curve, num_boxes) for curve in _curves(class_matches, chunk)]
                total[rows] += np.where(has_boxes, np.mean(curves, axis=0), 0.0)
                known[rows] += has_boxes
            progress.advance(len(chunk))
    return np.divide(total, known, out=np.full(len(weights), np.nan), where=known > 0)


def _curves(matches: ClassMatches, weights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the precision-recall curve of each IoU threshold, at its P true positives.

    Yields:
        (R, P) number of true positives so far, and the highest precision from there on. Precision
        only falls between two true positives, so other points are not needed.
    """
    rows, weight = _copies(matches, weights)  # (N,), (R, N)
    so_far = np.cumsum(weight, axis=1)
    outcomes = zip(matches.true_positive[:, rows], matches.ignored[:, rows], strict=True)
    for true_positive, ignored in outcomes:
        places = np.flatnonzero(true_positive)
        counted = so_far[:, places]
        if ignored.any():
            skipped = np.flatnonzero(ignored)
            sums = np.cumsum(weight[:, skipped], axis=1)
            sums = np.concatenate([np.zeros((len(weights), 1)), sums], axis=1)
            counted = counted - sums[:, np.searchsorted(skipped, places)]
        found = np.cumsum(weight[:, places], axis=1)
        # 0 of 0 if the first images have weight 0.
        precision = np.divide(found, counted, out=np.zeros_like(found), where=counted > 0)
        yield found, np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def _copies(matches: ClassMatches, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order in which detections are counted, and the weight of each.

    Returns:
        (N',) indices into `matches`: each once, except that detections of one image with equal
        scores occur once for each copy of the image, copy by copy. (R, N') their weights.
    """
    images, scores = matches.images, matches.scores
    same = (images[1:] == images[:-1]) & (scores[1:] == scores[:-1])  # as the previous detection
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
    # Each recall threshold takes the precision of the first true positive that reaches it. The
    # number of thresholds reached is computed with the floating-point comparison of pycocotools.
    recall = found / num_boxes
    nearest = np.rint(recall * 100).astype(np.intp)
    reached = nearest + (_RECALLS[nearest] <= recall)
    return (np.diff(reached, axis=1, prepend=0) * precision).sum(axis=1) / len(_RECALLS)
