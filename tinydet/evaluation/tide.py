"""TIDE: the AP50 lost to each kind of error (Bolya et al., ECCV 2020, arXiv 2008.08115).

Every false positive of the VOC metric in `voc.py` has one kind of error; a box that was not found
may be "missed". The cost of a kind is the AP50 gained by an oracle that fixes all errors
of that kind and no others:

    classification  IoU >= 0.5 with a box of another class; fixed by changing the class
    localisation    0.1 <= IoU < 0.5 with a box of its class; fixed by moving the detection there
    duplicate       its box has a higher-scoring detection; fixed by removing it
    background      IoU <= 0.1 with every box; fixed by removing it
    both            all others: 0.1 < IoU < 0.5 with a box of another class; fixed by removing it
    missed          a box that was not found and that no classification or localisation error is
                    about; fixed by removing the box

If the first two oracles assign several detections to one box, the highest-scoring one becomes the
true positive and the others are removed. Two further oracles cover all of precision and all of
recall: "false positive" removes every false positive, "false negative" removes every box that was
not found. The costs do not add up to the AP50 missing from 100 %, since one error can hide another.

Choices that the paper leaves open, and differences from it:

- AP50 is the area under VOC's curve, as in all reports of this package. The paper uses COCO's mean
  over 101 recalls.
- False positives are VOC's: a detection is assigned to the box of its class with the highest IoU,
  and is a duplicate if that box is taken, where COCO would try the next box.
- Difficult boxes (and crowds) take part in the IoUs above. The oracle removes an error about a
  difficult box, since a detection of such a box is ignored; a difficult box is never "missed".
- If several kinds apply, the first of localisation, classification, duplicate, background, both is
  used, as in the authors' program, tidecv.
- tidecv differs from the paper if an oracle assigns a second detection to a box: it keeps the
  existing true positive even if the other scores higher, and of a classification and a localisation
  error about one box it fixes only the one that scores higher. Here the highest score wins, in
  each oracle separately. The costs of a weak detector, which finds objects several times, can
  differ by half of their value.
- A class without ground truth is excluded from the means, whatever was detected. If the "missed"
  oracle removes all boxes of a class, its AP50 becomes 1 if it has no counted detections left, and
  stays 0 otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, ImageDetections, check_inputs, pairwise_iou
from tinydet.evaluation.voc import (
    FALSE_POSITIVE,
    IGNORED,
    TRUE_POSITIVE,
    area_ap,
    match_voc,
)

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
SUMS = ("false positive", "false negative")
SIZES = ("small", "medium", "large")

_FOREGROUND, _BACKGROUND = 0.5, 0.1  # IoU
_SMALL, _LARGE = 32.0**2, 96.0**2  # square pixels, COCO's


@dataclass(frozen=True)
class Tide:
    """AP50, and the AP50 lost to each kind of error, as fractions.

    The keys of the dicts are `KINDS` and `SUMS`, in that order.

    Attributes:
        ap50: mean over the classes with ground truth; NaN, like all costs, if there is none.
        lost: AP50 gained by fixing each kind.
        ap50_per_class: (K,), NaN without ground truth.
        lost_per_class: (K,) AP50 gained in each class; the means are `lost`. A classification error
            costs precision in the predicted class and recall in the true one.
        lost_by_size: for each of `SIZES` the overall AP50 gained by fixing the errors about objects
            of that size: small below 32 x 32 pixels, large above 96 x 96. The size is that of the
            ground-truth box concerned (`GroundTruth.areas`), for "background" and "both" that of
            the detection.
        counts: number of errors of each of `KINDS`, at any score.
    """

    ap50: float
    lost: dict[str, float]
    ap50_per_class: np.ndarray
    lost_per_class: dict[str, np.ndarray]
    lost_by_size: dict[str, dict[str, float]]
    counts: dict[str, int]


def tide(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
) -> Tide:
    """Classify the errors of detections and compute their costs, see the top of this file.

    Args:
        detections: one (boxes (N, 4), scores (N,), labels (N,)) for each image, as in `boxes.py`.
        ground_truth: one for each image, in the same order.
        num_classes: number of classes K.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    found, truth = check_inputs(detections, ground_truth, num_classes)
    errors = _by_score(found, truth)
    before = _average_precisions(errors, errors.labels, errors.outcome, errors.counted, num_classes)
    everything = range(len(SIZES))
    per_class = {
        kind: _fixed(errors, kind, everything, num_classes) - before for kind in KINDS + SUMS
    }
    return Tide(
        ap50=_mean(before),
        lost={kind: _mean(lost) for kind, lost in per_class.items()},
        ap50_per_class=before,
        lost_per_class=per_class,
        lost_by_size={
            name: {
                kind: _mean(_fixed(errors, kind, [size], num_classes) - before)
                for kind in KINDS + SUMS
            }
            for size, name in enumerate(SIZES)
        },
        counts={
            kind: int((errors.missed if kind == "missed" else errors.kind == kind).sum())
            for kind in KINDS
        },
    )


@dataclass(frozen=True)
class _Errors:
    """All detections by descending score, and all boxes.

    Attributes:
        labels: (N,) classes of detections.
        outcome: (N,) TRUE_POSITIVE, FALSE_POSITIVE or IGNORED.
        kind: (N,) one of `KINDS`, "" unless the detection is a false positive.
        box: (N,) index of the box that a detection or its error is about; -1 for none.
        size: (N,) indices into `SIZES`, of the object that an error is about.
        box_labels: (M,) classes of boxes.
        counted: (M,) bool, not difficult.
        unfound: (M,) bool, counted boxes without a true positive.
        missed: (M,) bool, those of them that no fixable error is about.
        box_size: (M,) indices into `SIZES`.
    """

    labels: np.ndarray
    outcome: np.ndarray
    kind: np.ndarray
    box: np.ndarray
    size: np.ndarray
    box_labels: np.ndarray
    counted: np.ndarray
    unfound: np.ndarray
    missed: np.ndarray
    box_size: np.ndarray


def classify_errors(
    found: Sequence[ImageDetections], truth: Sequence[GroundTruth]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the kind of error of each detection.

    Args:
        found: detections of each image, checked by `check_inputs`.
        truth: ground truth of each image, checked as well.

    Returns:
        For the N detections of all images in order: (N,) TRUE_POSITIVE, FALSE_POSITIVE or IGNORED
        as from `match_voc`, (N,) the kind of error, "" unless it is a false positive, and (N,) the
        index, over the boxes of all images, of the box that the detection or its error is about, -1
        for none.
    """
    outcome, box = match_voc(found, truth, _FOREGROUND)
    own_iou, own_box, other_iou, other_box = _overlaps(found, truth)
    # In reverse order of priority.
    kind = np.full(len(outcome), "both", dtype=f"U{max(map(len, KINDS))}")
    kind[np.maximum(own_iou, other_iou) <= _BACKGROUND] = "background"
    kind[own_iou >= _FOREGROUND] = "duplicate"
    kind[other_iou >= _FOREGROUND] = "classification"
    kind[(own_iou >= _BACKGROUND) & (own_iou < _FOREGROUND)] = "localisation"
    kind[outcome != FALSE_POSITIVE] = ""
    error_box = np.where(kind == "classification", other_box, own_box)
    box = np.where(outcome == FALSE_POSITIVE, error_box, box)
    return outcome, kind, np.where((kind == "both") | (kind == "background"), -1, box)


def _by_score(found: Sequence[ImageDetections], truth: Sequence[GroundTruth]) -> _Errors:
    order = np.argsort(-_concatenate([f.scores for f in found]), kind="stable")
    outcome, kind, box = (values[order] for values in classify_errors(found, truth))
    counted = ~_concatenate([t.difficult for t in truth]).astype(bool)
    unfound = counted.copy()
    unfound[box[outcome == TRUE_POSITIVE]] = False
    missed = unfound.copy()
    missed[box[(kind == "classification") | (kind == "localisation")]] = False
    box_size = _sizes(_concatenate([np.asarray(t.areas) for t in truth]))
    sides = np.concatenate([f.boxes[:, 2:] - f.boxes[:, :2] for f in found] or [np.zeros((0, 2))])
    size = _sizes(sides.prod(axis=1))[order]
    size[box >= 0] = box_size[box[box >= 0]]
    return _Errors(
        labels=_concatenate([f.labels for f in found]).astype(np.int64)[order],
        outcome=outcome,
        kind=kind,
        box=box,
        size=size,
        box_labels=_concatenate([t.labels for t in truth]).astype(np.int64),
        counted=counted,
        unfound=unfound,
        missed=missed,
        box_size=box_size,
    )


def _overlaps(
    found: Sequence[ImageDetections], truth: Sequence[GroundTruth]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the boxes with which each detection has the highest IoU.

    Returns:
        For all detections in order: the highest IoU with a box of its class and that box's index
        over all images, then the same for boxes of other classes; 0 and -1 if there are none.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    offset = 0
    for image, annotated in zip(found, truth, strict=True):
        count = len(image.labels)
        if not len(annotated.labels):
            parts.append(2 * (np.zeros(count), np.full(count, -1)))
            continue
        iou = pairwise_iou(image.boxes, annotated.boxes)  # (N, G)
        same = image.labels[:, None] == annotated.labels[None]
        best: tuple[np.ndarray, ...] = ()
        for selected in (same, ~same):
            masked = np.where(selected, iou, -1.0)
            box, value = masked.argmax(axis=1), masked.max(axis=1)
            best += (np.maximum(value, 0.0), np.where(value < 0, -1, box + offset))
        parts.append(best)
        offset += len(annotated.labels)
    own_iou, own_box, other_iou, other_box = (
        _concatenate(columns) for columns in (zip(*parts, strict=True) if parts else 4 * [[]])
    )
    return own_iou, own_box.astype(np.int64), other_iou, other_box.astype(np.int64)


def _fixed(errors: _Errors, kind: str, sizes: Sequence[int], num_classes: int) -> np.ndarray:
    """Return each class's AP50 after an oracle has fixed the errors of one kind and some sizes."""
    labels, outcome, counted = errors.labels.copy(), errors.outcome.copy(), errors.counted
    if kind in ("missed", "false negative"):
        removed = errors.missed if kind == "missed" else errors.unfound
        counted = counted & ~(removed & np.isin(errors.box_size, sizes))
    else:
        wrong = errors.outcome == FALSE_POSITIVE
        fixed = wrong if kind == "false positive" else errors.kind == kind
        fixed = fixed & np.isin(errors.size, sizes)
        outcome[fixed] = IGNORED
        if kind in ("classification", "localisation"):
            candidates = fixed.copy()
            candidates[fixed] = errors.counted[errors.box[fixed]]
            rows = np.flatnonzero(candidates | (outcome == TRUE_POSITIVE))
            outcome[rows] = IGNORED
            # The first detection of each box has the highest score.
            rows = rows[np.unique(errors.box[rows], return_index=True)[1]]
            outcome[rows] = TRUE_POSITIVE
            labels[rows] = errors.box_labels[errors.box[rows]]
    return _average_precisions(errors, labels, outcome, counted, num_classes)


def _average_precisions(
    errors: _Errors,
    labels: np.ndarray,
    outcome: np.ndarray,
    counted: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """Return the (K,) AP50 of detections by descending score; NaN for a class without boxes.

    `counted` are the ground-truth boxes that an oracle has left.
    """
    before = np.bincount(errors.box_labels[errors.counted], minlength=num_classes)
    num_boxes = np.bincount(errors.box_labels[counted], minlength=num_classes)
    rows = np.flatnonzero(outcome != IGNORED)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    ends = np.cumsum(np.bincount(labels[rows], minlength=num_classes))
    result = np.full(num_classes, np.nan)
    pieces = np.split(outcome[rows] == TRUE_POSITIVE, ends)
    for label in np.flatnonzero(before):
        if num_boxes[label]:
            result[label] = area_ap(np.cumsum(pieces[label]), int(num_boxes[label]))
        else:
            result[label] = float(not len(pieces[label]))
    return result


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) else np.zeros(0)


def _sizes(areas: np.ndarray) -> np.ndarray:
    return (areas >= _SMALL).astype(np.int64) + (areas > _LARGE)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
