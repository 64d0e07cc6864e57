"""Where AP50 is lost: the kinds of errors of TIDE (Bolya et al., ECCV 2020, arXiv 2008.08115).

Every detection that the VOC metric of `voc.py` calls wrong has one kind of error, and so may have a
box that was not found. A kind's weight is the AP50 that an oracle wins who repairs all errors of
that kind and no others:

    classification  at IoU 0.5 or more with a box of another class: it gets that class
    localisation    at IoU 0.1 or more, but below 0.5, with a box of its class: it moves there
    duplicate       its box is taken by a surer detection: it is left out
    background      at an IoU of 0.1 or less with every box: it is left out
    both            all else, i.e. between 0.1 and 0.5 with a box of another class: it is left out
    missed          a box that was not found, nor meant by a classification or localisation error:
                    it no longer has to be found

Where the first two oracles give a box more than one detection, the surest is right and the others
are left out. Two more, for all of precision and all of recall: "false positive" leaves every wrong
detection out, "false negative" asks for no box that was not found. The kinds do not add up to what
is missing from 100 %: one error can hide another.

What the paper leaves open, or does otherwise:

- AP50 is this tool's own, the area under VOC's curve: what is lost fits what is reported. The
  paper's is COCO's sum over 101 recalls.
- Wrong is what VOC calls so. A detection belongs to the box of its class that it overlaps most; if
  that is taken it is a duplicate, where COCO would try the next box.
- Difficult boxes (crowds are such) are part of the overlaps above. An error that means one is left
  out by its oracle, since a detection on a difficult box does not count; none is ever missed.
- Where several kinds fit, the one taken is the first of localisation, classification, duplicate,
  background, both: the order of the authors' program, tidecv.
- tidecv differs from the paper where an oracle gives a box a second detection: it keeps the one
  that was right before, even if the other is surer, and lets a classification and a localisation
  error of one box repair only the surer of the two. Here it is the surest, for each oracle alone.
  A weak detector finds objects several times, and its figures differ by as much as a half.
- A class without ground truth is left out of the means, whatever was detected. If the oracle of
  missed boxes leaves a class nothing to find, its AP50 becomes 100 % if it has no detections that
  count either, and stays 0 if it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, ImageDetections, check_inputs, pairwise_iou
from tinydet.evaluation.voc import IGNORED, RIGHT, WRONG, area_ap, match

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
SUMS = ("false positive", "false negative")
SIZES = ("small", "medium", "large")

_FOREGROUND, _BACKGROUND = 0.5, 0.1  # IoU
_SMALL, _LARGE = 32.0**2, 96.0**2  # square pixels, COCO's


@dataclass(frozen=True)
class Tide:
    """The AP50 of detections and what each kind of error costs, as fractions.

    The names in the dicts are `KINDS` and `SUMS`, in that order.

    Attributes:
        ap50: mean over the classes with ground truth; NaN if there is none, and so is all else.
        lost: AP50 that repairing a kind wins.
        ap50_per_class: (K,), NaN without ground truth.
        lost_per_class: the same of each class, (K,); their means are `lost`. A classification error
            costs the class it claims precision, and the class it is of recall.
        lost_by_size: the AP50 over all sizes that repairing the errors about objects of one size
            wins, for each of `SIZES`: small below 32 x 32 pixels, large above 96 x 96. An error is
            about the box that it misses, doubles or means (its `areas`, as in `GroundTruth`); where
            there is none, i.e. for "background" and "both", its own area is taken.
        counts: number of errors of each of `KINDS`, at whatever score.
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
    """Tell the errors of detections apart and weigh them, as at the top of this file.

    Args:
        detections: one (boxes (N, 4), scores (N,), labels (N,)) an image, as in `boxes.py`.
        ground_truth: one an image, in the same order.
        num_classes: number of classes K.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    found, truth = check_inputs(detections, ground_truth, num_classes)
    judged = _by_score(found, truth)
    before = _average_precisions(judged, judged.labels, judged.outcome, judged.counted, num_classes)
    everything = range(len(SIZES))
    per_class = {
        kind: _repaired(judged, kind, everything, num_classes) - before for kind in KINDS + SUMS
    }
    return Tide(
        ap50=_mean(before),
        lost={kind: _mean(lost) for kind, lost in per_class.items()},
        ap50_per_class=before,
        lost_per_class=per_class,
        lost_by_size={
            name: {
                kind: _mean(_repaired(judged, kind, [size], num_classes) - before)
                for kind in KINDS + SUMS
            }
            for size, name in enumerate(SIZES)
        },
        counts={
            kind: int((judged.missed if kind == "missed" else judged.kind == kind).sum())
            for kind in KINDS
        },
    )


@dataclass(frozen=True)
class _Judged:
    """All detections, by descending score, and all boxes.

    Attributes:
        labels: (N,) classes of detections.
        outcome: (N,) RIGHT, WRONG or IGNORED.
        kind: (N,) of `KINDS`, "" where the detection is not wrong.
        box: (N,) number of the box that a detection is on, or that its error is about; -1 is none.
        size: (N,) positions in `SIZES`, of what an error is about.
        box_labels: (M,) classes of boxes.
        counted: (M,) bool, not difficult.
        unfound: (M,) bool, boxes that count and that no detection is right on.
        missed: (M,) bool, those of them that no error could be repaired to find.
        box_size: (M,) positions in `SIZES`.
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


def judge(
    found: Sequence[ImageDetections], truth: Sequence[GroundTruth]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tell the errors of detections apart.

    Args:
        found: detections of each image, checked by `check_inputs`.
        truth: ground truth of each image, checked as well.

    Returns:
        For the N detections of all images in order: (N,) RIGHT, WRONG or IGNORED as by `match`,
        (N,) the name of the error, "" where it is not wrong, and (N,) the number over all images of
        the box that it is on or its error is about, -1 if that is none.
    """
    outcome, box = match(found, truth, _FOREGROUND)
    own_iou, own_box, other_iou, other_box = _overlaps(found, truth)
    # From the last to the first of those that may fit.
    kind = np.full(len(outcome), "both", dtype=f"U{max(map(len, KINDS))}")
    kind[np.maximum(own_iou, other_iou) <= _BACKGROUND] = "background"
    kind[own_iou >= _FOREGROUND] = "duplicate"
    kind[other_iou >= _FOREGROUND] = "classification"
    kind[(own_iou >= _BACKGROUND) & (own_iou < _FOREGROUND)] = "localisation"
    kind[outcome != WRONG] = ""
    box = np.where(outcome == WRONG, np.where(kind == "classification", other_box, own_box), box)
    return outcome, kind, np.where((kind == "both") | (kind == "background"), -1, box)


def _by_score(found: Sequence[ImageDetections], truth: Sequence[GroundTruth]) -> _Judged:
    order = np.argsort(-_joined([f.scores for f in found]), kind="stable")
    outcome, kind, box = (values[order] for values in judge(found, truth))
    counted = ~_joined([t.difficult for t in truth]).astype(bool)
    unfound = counted.copy()
    unfound[box[outcome == RIGHT]] = False
    missed = unfound.copy()
    missed[box[(kind == "classification") | (kind == "localisation")]] = False
    box_size = _sizes(_joined([t.areas for t in truth]))
    sides = np.concatenate([f.boxes[:, 2:] - f.boxes[:, :2] for f in found] or [np.zeros((0, 2))])
    size = _sizes(sides.prod(axis=1))[order]
    size[box >= 0] = box_size[box[box >= 0]]
    return _Judged(
        labels=_joined([f.labels for f in found]).astype(np.int64)[order],
        outcome=outcome,
        kind=kind,
        box=box,
        size=size,
        box_labels=_joined([t.labels for t in truth]).astype(np.int64),
        counted=counted,
        unfound=unfound,
        missed=missed,
        box_size=box_size,
    )


def _overlaps(
    found: Sequence[ImageDetections], truth: Sequence[GroundTruth]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the boxes that each detection overlaps most.

    Returns:
        For all detections in order: the IoU with the best box of its class and that box's number
        over all images, then the same for the boxes of other classes. Without any: 0 and -1.
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
        for is_meant in (same, ~same):
            masked = np.where(is_meant, iou, -1.0)
            box, value = masked.argmax(axis=1), masked.max(axis=1)
            best += (np.maximum(value, 0.0), np.where(value < 0, -1, box + offset))
        parts.append(best)
        offset += len(annotated.labels)
    own_iou, own_box, other_iou, other_box = (
        _joined(columns) for columns in (zip(*parts, strict=True) if parts else 4 * [[]])
    )
    return own_iou, own_box.astype(np.int64), other_iou, other_box.astype(np.int64)


def _repaired(judged: _Judged, kind: str, sizes: Sequence[int], num_classes: int) -> np.ndarray:
    """Return each class's AP50 after the oracle of a kind has repaired the errors of some sizes."""
    labels, outcome, counted = judged.labels.copy(), judged.outcome.copy(), judged.counted
    if kind in ("missed", "false negative"):
        unwanted = judged.missed if kind == "missed" else judged.unfound
        counted = counted & ~(unwanted & np.isin(judged.box_size, sizes))
    else:
        wrong = judged.outcome == WRONG
        repaired = wrong if kind == "false positive" else judged.kind == kind
        repaired = repaired & np.isin(judged.size, sizes)
        outcome[repaired] = IGNORED
        if kind in ("classification", "localisation"):
            claims = repaired.copy()
            claims[repaired] = judged.counted[judged.box[repaired]]
            rows = np.flatnonzero(claims | (outcome == RIGHT))
            outcome[rows] = IGNORED
            # The surest on each box comes first.
            rows = rows[np.unique(judged.box[rows], return_index=True)[1]]
            outcome[rows] = RIGHT
            labels[rows] = judged.box_labels[judged.box[rows]]
    return _average_precisions(judged, labels, outcome, counted, num_classes)


def _average_precisions(
    judged: _Judged,
    labels: np.ndarray,
    outcome: np.ndarray,
    counted: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """Return the (K,) AP50 of detections by descending score; NaN for a class of no boxes at all.

    `counted` are the boxes that have to be found now.
    """
    before = np.bincount(judged.box_labels[judged.counted], minlength=num_classes)
    num_boxes = np.bincount(judged.box_labels[counted], minlength=num_classes)
    rows = np.flatnonzero(outcome != IGNORED)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    ends = np.cumsum(np.bincount(labels[rows], minlength=num_classes))
    result = np.full(num_classes, np.nan)
    pieces = np.split(outcome[rows] == RIGHT, ends)
    for label in np.flatnonzero(before):
        if num_boxes[label]:
            result[label] = area_ap(np.cumsum(pieces[label]), int(num_boxes[label]))
        else:
            result[label] = float(not len(pieces[label]))
    return result


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) else np.zeros(0)


def _sizes(areas: np.ndarray) -> np.ndarray:
    return (areas >= _SMALL).astype(np.int64) + (areas > _LARGE)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
