"""The errors of a detector in each image, and how they differ between two detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, ImageDetections, check_inputs, pairwise_iou
from tinydet.evaluation.tide import Tide, classify_errors, tide
from tinydet.evaluation.voc import TRUE_POSITIVE


@dataclass(frozen=True)
class ImageErrors:
    """The detections of one image above a score threshold, matched to its ground truth.

    Attributes:
        detections: those with the lowest score asked for, or more.
        wrong: (N,) bool, false positives (duplicates included).
        kinds: (N,) kind of error, one of `tide.KINDS`; "" if there is none.
        truth: all boxes of the image.
        missed: (M,) bool, boxes that no detection found; difficult boxes excluded.
    """

    detections: ImageDetections
    wrong: np.ndarray
    kinds: np.ndarray
    truth: GroundTruth
    missed: np.ndarray

    @property
    def badness(self) -> float:
        """Number of missed boxes plus the sum of the false positives' scores."""
        return float(self.missed.sum() + self.detections.scores[self.wrong].sum())

    @property
    def num_counted(self) -> int:
        """Number of boxes that are not difficult."""
        return int((~self.truth.difficult).sum())


@dataclass(frozen=True)
class ImageChange:
    """The errors of two detectors, base and idea, in one image.

    Attributes:
        index: position of the image.
        base: errors of the base.
        idea: errors of the idea.
        found: (M,) bool, boxes that only the idea finds.
        lost: (M,) bool, boxes that only the base finds.
        new: (N,) bool, false positives of the idea that the base does not have.
        gone: (N,) bool, false positives of the base that the idea does not have.
    """

    index: int
    base: ImageErrors
    idea: ImageErrors
    found: np.ndarray
    lost: np.ndarray
    new: np.ndarray
    gone: np.ndarray

    @property
    def gain(self) -> float:
        """Boxes found minus boxes lost, plus the scores of false positives gone minus those of new.

        Positive if the idea is better; errors are weighted as in `ImageErrors.badness`.
        """
        gone = self.base.detections.scores[self.gone].sum()
        new = self.idea.detections.scores[self.new].sum()
        return float(self.found.sum() - self.lost.sum() + gone - new)


@dataclass(frozen=True)
class ErrorChanges:
    """The differences in errors from base to idea.

    Attributes:
        base: AP50 of the base, and the cost of its errors.
        idea: the same for the idea.
        images: one for each image, in order.
    """

    base: Tide
    idea: Tide
    images: list[ImageChange]

    @property
    def improved(self) -> list[ImageChange]:
        """The images with a positive gain, largest gain first."""
        improved = [change for change in self.images if change.gain > 0]
        return sorted(improved, key=lambda change: -change.gain)

    @property
    def worsened(self) -> list[ImageChange]:
        """The images with a negative gain, largest loss first."""
        return sorted((c for c in self.images if c.gain < 0), key=lambda change: change.gain)


def image_errors(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    min_score: float = 0.3,
) -> list[ImageErrors]:
    """Match detections as the VOC metric does, and return the errors of every image.

    Args:
        detections: one (boxes (N, 4), scores (N,), labels (N,)) for each image, as in `boxes.py`.
        ground_truth: one for each image, in the same order.
        num_classes: number of classes K.
        min_score: detections below it are dropped, as in a drawing.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    found, truth = check_inputs(detections, ground_truth, num_classes)
    kept = [ImageDetections(*(part[f.scores >= min_score] for part in f)) for f in found]
    outcome, kind, box = classify_errors(kept, truth)
    missed = ~np.concatenate([t.difficult for t in truth] or [np.zeros(0, bool)])
    missed[box[outcome == TRUE_POSITIVE]] = False
    kinds_per_image = np.split(kind, np.cumsum([len(f.labels) for f in kept])[:-1])
    missed_per_image = np.split(missed, np.cumsum([len(t.labels) for t in truth])[:-1])
    return [
        ImageErrors(image, kinds != "", kinds, boxes, not_found)
        for image, kinds, boxes, not_found in zip(
            kept, kinds_per_image, truth, missed_per_image, strict=False
        )
    ]


def compare_errors(
    base: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    idea: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    min_score: float = 0.3,
) -> ErrorChanges:
    """Compare the errors of two detectors on the same images.

    Two false positives are the same error if they have the same class and an IoU of at least 0.5.

    Args:
        base: one (boxes (N, 4), scores (N,), labels (N,)) for each image, as in `boxes.py`.
        idea: the same of the other detector.
        ground_truth: one for each image, in the same order.
        num_classes: number of classes K.
        min_score: detections below it are dropped from the images' errors; AP50 and the costs of
            errors include all detections.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    errors = [image_errors(found, ground_truth, num_classes, min_score) for found in (base, idea)]
    return ErrorChanges(
        tide(base, ground_truth, num_classes),
        tide(idea, ground_truth, num_classes),
        [_change(i, *both) for i, both in enumerate(zip(*errors, strict=True))],
    )


def _change(index: int, base: ImageErrors, idea: ImageErrors) -> ImageChange:
    return ImageChange(
        index,
        base,
        idea,
        found=base.missed & ~idea.missed,
        lost=idea.missed & ~base.missed,
        new=idea.wrong & ~_shared(idea, base),
        gone=base.wrong & ~_shared(base, idea),
    )


def _shared(errors: ImageErrors, others: ImageErrors) -> np.ndarray:
    """Return (N,) bool, detections that are also false positives of the other detector."""
    mine, theirs = errors.detections, others.detections
    same = mine.labels[:, None] == theirs.labels[others.wrong][None]
    iou = pairwise_iou(mine.boxes, theirs.boxes[others.wrong])
    return (same & (iou >= 0.5)).any(axis=1)
