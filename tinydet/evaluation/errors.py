"""What a detector got wrong in each image: boxes it missed, and detections that are no object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.evaluation.boxes import GroundTruth, ImageDetections, check_inputs
from tinydet.evaluation.tide import judge
from tinydet.evaluation.voc import RIGHT


@dataclass(frozen=True)
class ImageErrors:
    """The surer detections of one image and their ground truth, matched.

    Attributes:
        detections: those with the least score asked for, or more.
        wrong: (N,) bool, detections that are false positives or duplicates.
        kinds: (N,) what is wrong with them, of `tide.KINDS`; "" if nothing is.
        truth: all boxes of the image.
        missed: (M,) bool, boxes that count and that no detection found.
    """

    detections: ImageDetections
    wrong: np.ndarray
    kinds: np.ndarray
    truth: GroundTruth
    missed: np.ndarray

    @property
    def badness(self) -> float:
        """Missed boxes, plus the scores of the wrong detections: a sure mistake weighs more."""
        return float(self.missed.sum() + self.detections.scores[self.wrong].sum())


def image_errors(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    min_score: float = 0.3,
) -> list[ImageErrors]:
    """Match the surer detections as the VOC metric does, and return the errors of every image.

    Args:
        detections: one (boxes (N, 4), scores (N,), labels (N,)) an image, as in `boxes.py`.
        ground_truth: one an image, in the same order.
        num_classes: number of classes K.
        min_score: detections below it are left out, as a user would who draws them.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    found, truth = check_inputs(detections, ground_truth, num_classes)
    kept = [ImageDetections(*(part[f.scores >= min_score] for part in f)) for f in found]
    outcome, kind, box = judge(kept, truth)
    missed = ~np.concatenate([t.difficult for t in truth] or [np.zeros(0, bool)])
    missed[box[outcome == RIGHT]] = False
    kinds = np.split(kind, np.cumsum([len(f.labels) for f in kept])[:-1])
    missed = np.split(missed, np.cumsum([len(t.labels) for t in truth])[:-1])
    return [
        ImageErrors(found, kinds != "", kinds, annotated, unfound)
        for found, kinds, annotated, unfound in zip(kept, kinds, truth, missed, strict=False)
    ]
