"""The numbers reported for a detector: VOC and COCO average precision of the same detections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydet.evaluation.boxes import GroundTruth
from tinydet.evaluation.coco import CocoResult, evaluate_coco
from tinydet.evaluation.voc import VocResult, evaluate_voc
from tinydet.report.table import text_table

# What an average precision is that is NaN.
UNDEFINED = "undefined: the test images have no object to find (difficult ones do not count)"


@dataclass(frozen=True)
class Metrics:
    """Average precisions as fractions (0.5 is 50 %); NaN where no ground truth counts.

    Attributes:
        classes: class names in label order.
        num_images: images evaluated.
        voc: VOC's area and 11-point average precision at IoU 0.5.
        coco: COCO's average precisions.
        detections: what was evaluated, one an image.
    """

    classes: tuple[str, ...]
    num_images: int
    voc: VocResult
    coco: CocoResult
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]

    @property
    def ap50(self) -> float:
        """VOC area average precision at IoU 0.5, the mean over classes."""
        return self.voc.mean_area

    @property
    def ap50_11pt(self) -> float:
        """VOC 2007's 11-point average precision at IoU 0.5, the mean over classes."""
        return self.voc.mean_11pt

    @property
    def ap(self) -> float:
        """COCO's average precision over IoU 0.5 to 0.95."""
        return self.coco.ap

    def as_dict(self) -> dict[str, Any]:
        """Return what `metrics.json` holds: plain numbers and names, None for NaN."""
        per_class = {
            name: {
                "AP50": _number(self.voc.ap_area[k]),
                "AP50_11pt": _number(self.voc.ap_11pt[k]),
                "AP": _number(self.coco.ap_per_class[k]),
                "boxes": int(self.voc.num_boxes[k]),
            }
            for k, name in enumerate(self.classes)
        }
        return {
            "AP50": _number(self.ap50),
            "AP50_11pt": _number(self.ap50_11pt),
            "AP": _number(self.ap),
            "AP75": _number(self.coco.ap75),
            "AP_small": _number(self.coco.ap_small),
            "AP_medium": _number(self.coco.ap_medium),
            "AP_large": _number(self.coco.ap_large),
            "images": self.num_images,
            "boxes": int(self.voc.num_boxes.sum()),
            "per_class": per_class,
        }

    def in_words(self) -> str:
        """Return the main figures as a phrase."""
        if math.isnan(self.ap50):
            return f"AP50 and AP {UNDEFINED}"
        return f"AP50 {100 * self.ap50:.2f} %, AP {100 * self.ap:.2f} %"

    def lines(self) -> list[str]:
        """Return a table with one line for each class, then the means, in percent; "-" is NaN."""
        values = self.as_dict()
        keys = ("AP50", "AP50_11pt", "AP")
        rows = [
            (name, str(row["boxes"]), *(_percent(row[key]) for key in keys))
            for name, row in (*values["per_class"].items(), ("mean", values))
        ]
        table = text_table(("class", "boxes", "AP50", "11-pt", "COCO"), rows)
        sizes = ("AP75", "AP_small", "AP_medium", "AP_large")
        more = "  ".join(f"{key} {_percent(values[key])}" for key in sizes)
        table.append(f"COCO: {more}  (percent, {self.num_images} images)")
        return [*table, self.in_words()] if math.isnan(self.ap50) else table


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def evaluate(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    classes: Sequence[str],
) -> Metrics:
    """Evaluate detections by the VOC and the COCO metrics.

    Args:
        detections: one (boxes (N, 4), scores (N,), labels (N,)) an image, as in `boxes.py`.
        ground_truth: one an image, in the same order.
        classes: class names in label order.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    return Metrics(
        classes=tuple(classes),
        num_images=len(ground_truth),
        voc=evaluate_voc(detections, ground_truth, len(classes)),
        coco=evaluate_coco(detections, ground_truth, len(classes)),
        detections=detections,
    )
