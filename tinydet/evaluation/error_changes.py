"""What changed in the errors from one detector, the base, to another, the idea."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, pairwise_iou
from tinydet.evaluation.errors import ImageErrors, image_errors
from tinydet.evaluation.tide import Tide, tide


@dataclass(frozen=True)
class ImageChange:
    """The errors of both in one image, among the surer detections.

    Attributes:
        index: position of the image.
        base: errors of the base.
        idea: errors of the idea.
        found: (M,) bool, boxes that only the idea finds.
        lost: (M,) bool, boxes that only the base finds.
        new: (N,) bool, wrong detections of the idea that the base does not have.
        gone: (N,) bool, wrong detections of the base that the idea does not have.
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
        """Boxes found less those lost, plus the scores of wrong detections gone less those of new.

        Above 0 the image is better than before: a mistake weighs as in `ImageErrors.badness`.
        """
        gone = self.base.detections.scores[self.gone].sum()
        new = self.idea.detections.scores[self.new].sum()
        return float(self.found.sum() - self.lost.sum() + gone - new)


@dataclass(frozen=True)
class ErrorChanges:
    """What changed from base to idea.

    Attributes:
        base: AP50 of the base, and what its errors cost.
        idea: the same of the idea.
        images: one an image, in order.
    """

    base: Tide
    idea: Tide
    images: list[ImageChange]

    @property
    def improved(self) -> list[ImageChange]:
        """The images that gained, those that gained most first."""
        gained = [change for change in self.images if change.gain > 0]
        return sorted(gained, key=lambda change: -change.gain)

    @property
    def worsened(self) -> list[ImageChange]:
        """The images that became worse, the worst of them first."""
        return sorted((c for c in self.images if c.gain < 0), key=lambda change: change.gain)


def compare_errors(
    base: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    idea: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    min_score: float = 0.3,
) -> ErrorChanges:
    """Compare the errors of two detectors on the same images.

    A wrong detection is the other's too if that has a wrong one of the class at IoU 0.5 or more.

    Args:
        base: one (boxes (N, 4), scores (N,), labels (N,)) an image, as in `boxes.py`.
        idea: the same of the other detector.
        ground_truth: one an image, in the same order.
        num_classes: number of classes K.
        min_score: what is told image by image leaves out detections below it; AP50 and what it is
            lost to count them all.

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
    """Return (N,) bool, detections that the other detector has as well, as wrong ones."""
    mine, theirs = errors.detections, others.detections
    same = mine.labels[:, None] == theirs.labels[others.wrong][None]
    iou = pairwise_iou(mine.boxes, theirs.boxes[others.wrong])
    return (same & (iou >= 0.5)).any(axis=1)
