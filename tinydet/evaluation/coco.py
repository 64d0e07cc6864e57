"""COCO average precision by pycocotools, on arrays instead of JSON files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tinydet.evaluation.boxes import GroundTruth, check_inputs


@dataclass(frozen=True)
class CocoResult:
    """COCO's average precisions, as fractions; NaN without ground truth.

    Sizes are areas in pixels of the original image: small below 32 x 32, large above 96 x 96. The
    areas are the ground truth's `areas` (in COCO those of the masks), by default the boxes' areas.

    Attributes:
        ap: mean over IoU thresholds 0.5, 0.55, ... 0.95 and over classes with ground truth.
        ap50: at IoU 0.5.
        ap75: at IoU 0.75.
        ap_small: `ap` of small objects.
        ap_medium: `ap` of medium objects.
        ap_large: `ap` of large objects.
        ap_per_class: (K,) `ap` of each class.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ap_per_class: np.ndarray


class _Evaluation(COCOeval):
    """COCOeval that treats difficult boxes that are not crowds as the VOC devkit does.

    pycocotools overwrites a box's "ignore" with its "iscrowd", and only a crowd can match more than
    one detection. Difficult boxes are therefore passed as crowds. But pycocotools divides the
    overlap with a crowd by the *detection's* area, so that any small detection inside a large
    difficult box would be ignored. This class keeps the usual IoU except for true crowds.
    """

    def computeIoU(self, image_id: int, category_id: int) -> Any:  # noqa: N802 (overrides)
        truth, found = self._gts[image_id, category_id], self._dts[image_id, category_id]
        if not truth and not found:
            return []
        order = np.argsort([-d["score"] for d in found], kind="mergesort")
        boxes = [found[i]["bbox"] for i in order[: self.params.maxDets[-1]]]
        crowd = [g["crowd"] for g in truth]
        return mask.iou(boxes, [g["bbox"] for g in truth], crowd)


def evaluate_coco(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
) -> CocoResult:
    """Return COCO's average precisions (101 recalls, at most 100 detections an image and class).

    Difficult boxes need not be found. Detections whose best remaining match is a difficult box are
    ignored, however many there are: see `_Evaluation`. The "IoU" with a crowd is the overlap over
    the detection's area. Otherwise matching is COCO's: a detection is assigned to the best box that
    is still *free*, where VOC counts it as a duplicate.

    Args:
        detections: one (boxes (N, 4), scores (N,), labels (N,)) for each image, as in `boxes.py`.
        ground_truth: one for each image, in the same order.
        num_classes: number of classes K.

    Raises:
        ValueError: an array has the wrong shape or content; the message names the image.
    """
    evaluation = _match(detections, ground_truth, num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    # (T thresholds, R recalls, K, A areas, 1), -1 without ground truth
    precision = evaluation.eval["precision"][..., 0]
    return CocoResult(
        ap=_mean(precision[..., 0]),
        ap50=_mean(precision[0, ..., 0]),
        ap75=_mean(precision[5, ..., 0]),
        ap_small=_mean(precision[..., 1]),
        ap_medium=_mean(precision[..., 2]),
        ap_large=_mean(precision[..., 3]),
        ap_per_class=np.array([_mean(precision[:, :, k, 0]) for k in range(num_classes)]),
    )


@dataclass(frozen=True)
class ClassMatches:
    """The matched detections of one class, by descending score over all images.

    Attributes:
        images: (N,) index of each detection's image.
        scores: (N,), equal scores in the order of the images.
        true_positive: (T, N) bool, at each of T IoU thresholds.
        ignored: (T, N) bool, neither true nor false positive.
        boxes: (I,) number of ground-truth boxes in each of I images, difficult ones excluded.
    """

    images: np.ndarray
    scores: np.ndarray
    true_positive: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray


def match_coco(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
) -> list[ClassMatches]:
    """Match detections as `evaluate_coco` does, at its ten IoU thresholds, for all sizes together.

    Same arguments and errors; at most 100 detections of each image and class are used.
    """
    evaluation = _match(detections, ground_truth, num_classes, all_sizes=False)
    thresholds, num_images = len(evaluation.params.iouThrs), len(ground_truth)
    matches = []
    for label in range(num_classes):
        # None is an image with neither detections nor boxes of the class.
        images = evaluation.evalImgs[label * num_images : (label + 1) * num_images]
        present = [image for image in images if image is not None]
        boxes = np.zeros(num_images)
        for image in present:
            boxes[image["image_id"]] = np.count_nonzero(image["gtIgnore"] == 0)
        none = np.zeros((thresholds, 0), bool)
        ignored = np.concatenate([none, *(i["dtIgnore"] for i in present)], axis=1).astype(bool)
        matched = np.concatenate([none, *(i["dtMatches"] for i in present)], axis=1) > 0
        indices = np.array([i["image_id"] for i in present], np.int64)
        image_of = np.repeat(indices, [len(i["dtScores"]) for i in present])
        scores = np.concatenate([np.zeros(0), *(i["dtScores"] for i in present)])
        order = np.argsort(-scores, kind="stable")
        positive = (matched & ~ignored)[:, order]
        matches.append(
            ClassMatches(image_of[order], scores[order], positive, ignored[:, order], boxes)
        )
    return matches


def _match(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    all_sizes: bool = True,
) -> COCOeval:
    """Return pycocotools' evaluation after matching every image."""
    found, truth = check_inputs(detections, ground_truth, num_classes)
    rows: list[dict[str, Any]] = [
        {"iscrowd": int(difficult), "crowd": int(crowd), "area": area}
        for image in truth
        for difficult, crowd, area in zip(
            image.difficult, np.asarray(image.crowd), np.asarray(image.areas).tolist(), strict=True
        )
    ]
    truth_set = _data_set([(t.boxes, t.labels) for t in truth], rows, num_classes)
    rows = [{"iscrowd": 0, "score": s} for image in found for s in image.scores.tolist()]
    found_set = _data_set([(f.boxes, f.labels) for f in found], rows, num_classes)
    evaluation = _Evaluation(truth_set, found_set, "bbox")
    evaluation.params.maxDets = [100]
    if not all_sizes:
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return evaluation


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")


def _data_set(
    images: list[tuple[np.ndarray, np.ndarray]], rows: list[dict[str, Any]], num_classes: int
) -> COCO:
    """Return boxes and labels as an indexed pycocotools data set.

    `rows` are the other fields of each annotation, in order; the default "area" is the box's.
    """
    annotations: list[dict[str, Any]] = []
    for index, (boxes, labels) in enumerate(images):
        sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)  # xywh
        areas = sides[:, 2] * sides[:, 3]
        for box, area, label in zip(sides.tolist(), areas.tolist(), labels.tolist(), strict=True):
            # IDs start at 1: for pycocotools 0 means "unmatched".
            number = len(annotations) + 1
            annotations.append(
                {"id": number, "image_id": index, "category_id": label, "bbox": box, "area": area}
                | rows[number - 1]
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index} for index in range(len(images))],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
