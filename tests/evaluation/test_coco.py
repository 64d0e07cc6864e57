"""COCO average precision: hand-worked, and against pycocotools called the plain way with files."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.coco import evaluate_coco


def truth(boxes, labels=None, difficult=None):
    count = len(boxes)
    labels = np.zeros(count, np.int64) if labels is None else np.array(labels)
    difficult = np.zeros(count, bool) if difficult is None else np.array(difficult)
    return GroundTruth(np.array(boxes, float).reshape(-1, 4), labels, difficult)


def found(boxes, scores, labels=None):
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.array(labels)
    return ImageDetections(np.array(boxes, float).reshape(-1, 4), np.array(scores), labels)


def random_images(rng, num_images, num_classes):
    detections, ground_truth = [], []
    for _ in range(num_images):
        count = rng.integers(0, 8)
        corner = rng.uniform(0, 150, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 180, (count, 2))], 1)
        labels = rng.integers(0, num_classes, count)
        ground_truth.append(truth(boxes, labels))
        copies = np.repeat(np.arange(count), 3)
        jittered = boxes[copies] + rng.normal(0, 6, (len(copies), 4))
        jittered[:, 2:] = np.maximum(jittered[:, 2:], jittered[:, :2] + 1)
        wrong = rng.random(len(copies)) < 0.3
        labels = np.where(wrong, rng.integers(0, num_classes, len(copies)), labels[copies])
        detections.append(found(jittered, rng.random(len(copies)).round(1), labels))
    return detections, ground_truth


def pycocotools_from_files(folder, detections, ground_truth, num_classes):
    annotations, results = [], []
    for image, (d, g) in enumerate(zip(detections, ground_truth, strict=True)):
        for (x1, y1, x2, y2), label in zip(g.boxes.tolist(), g.labels.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(annotations) + 1, "image_id": image + 7, "category_id": label + 3}
            annotations.append({**row, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        for (x1, y1, x2, y2), s, label in zip(*(v.tolist() for v in d), strict=True):
            row = {"image_id": image + 7, "category_id": label + 3, "score": s}
            results.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    data = {
        "info": {},
        "images": [{"id": image + 7} for image in range(len(detections))],
        "categories": [{"id": label + 3} for label in range(num_classes)],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(data))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_pycocotools_on_files(tmp_path, seed):
    detections, ground_truth = random_images(np.random.default_rng(seed), 12, 4)
    stats = pycocotools_from_files(tmp_path, detections, ground_truth, 4)
    result = evaluate_coco(detections, ground_truth, 4)
    assert 0.05 < result.ap < 0.9  # a case that says something
    actual = [
        result.ap,
        result.ap50,
        result.ap75,
        result.ap_small,
        result.ap_medium,
        result.ap_large,
    ]
    np.testing.assert_allclose(actual, stats[:6], atol=1e-12)
    np.testing.assert_allclose(np.nanmean(result.ap_per_class), stats[0], atol=1e-12)


def test_iou_thresholds_worked_by_hand():
    # IoU exactly 0.75: right at the 6 thresholds 0.5 to 0.75 and wrong at the other 4.
    result = evaluate_coco(
        [found([[0, 0, 40, 30]], [0.9])], [truth([[0, 0, 40, 40]])], num_classes=1
    )
    assert (result.ap50, result.ap75) == pytest.approx((1.0, 1.0))
    assert result.ap == pytest.approx(0.6)


def test_sizes_are_areas_of_boxes():
    boxes = [[0, 0, 20, 20], [100, 0, 150, 50], [200, 0, 350, 150]]  # small, medium, large
    result = evaluate_coco([found([boxes[0], boxes[2]], [0.9, 0.8])], [truth(boxes)], num_classes=1)
    assert (result.ap_small, result.ap_medium, result.ap_large) == pytest.approx((1, 0, 1))


def test_any_number_of_detections_of_a_difficult_box_is_excused():
    hard, easy = [0, 0, 50, 50], [100, 100, 150, 150]
    ground_truth = [truth([hard, easy], difficult=[True, False])]
    three = found([hard, hard, hard, easy], [0.9, 0.8, 0.7, 0.6])
    assert evaluate_coco([three], ground_truth, 1).ap == pytest.approx(1.0)
    # Missing it costs nothing either.
    assert evaluate_coco([found([easy], [0.6])], ground_truth, 1).ap == pytest.approx(1.0)


def test_small_detection_inside_a_difficult_box_is_wrong():
    # IoU 0.04; over its own area alone, as for a COCO crowd, the overlap would be 1.
    hard, easy = [0, 0, 50, 50], [100, 100, 150, 150]
    ground_truth = [truth([hard, easy], difficult=[True, False])]
    result = evaluate_coco([found([[20, 20, 30, 30], easy], [0.9, 0.6])], ground_truth, 1)
    assert result.ap == pytest.approx(0.5)


def test_whatever_lies_inside_a_crowd_is_excused():
    # As the test above, but the difficult box is a crowd: the overlap over the detection's area.
    crowd, single = [0, 0, 50, 50], [100, 100, 150, 150]
    boxes, labels = np.array([crowd, single], float), np.zeros(2, np.int64)
    ground_truth = [GroundTruth(boxes, labels, np.zeros(2, bool), crowd=np.array([True, False]))]
    inside = found([[20, 20, 30, 30], [0, 0, 10, 10], single], [0.9, 0.8, 0.6])
    assert evaluate_coco([inside], ground_truth, 1).ap == pytest.approx(1.0)
    # Half of it outside: excused at IoU 0.5 only, the first of two detections at the others.
    half = evaluate_coco([found([[40, 0, 60, 10], single], [0.9, 0.6])], ground_truth, 1)
    assert (half.ap50, half.ap75) == pytest.approx((1.0, 0.5))


def test_sizes_are_the_areas_given():
    boxes = [[0, 0, 150, 150], [200, 0, 350, 150]]
    plain = truth(boxes)
    ground_truth = [
        GroundTruth(plain.boxes, plain.labels, plain.difficult, areas=np.array([1000.0, 5000.0]))
    ]
    result = evaluate_coco([found(boxes[:1], [0.9])], ground_truth, 1)
    assert (result.ap_small, result.ap_medium) == pytest.approx((1, 0))
    assert np.isnan(result.ap_large)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"areas": np.array([np.nan])}, "ground truth of image 0: an area is not finite"),
        ({"areas": np.zeros(2)}, r"image 0: areas have shape \(2,\) for 1 boxes"),
        ({"crowd": np.zeros(2, bool)}, r"image 0: crowd have shape \(2,\) for 1 boxes"),
    ],
)
def test_areas_and_crowds_that_cannot_be(more, says):
    wrong = GroundTruth(np.ones((1, 4)), np.zeros(1, np.int64), np.zeros(1, bool), **more)
    with pytest.raises(ValueError, match=says):
        evaluate_coco([found([], [])], [wrong], 1)


def test_without_detections_is_zero_and_without_ground_truth_nan():
    box = [0, 0, 50, 50]
    empty = evaluate_coco([found([], [])], [truth([box])], 2)
    assert empty.ap == 0.0
    np.testing.assert_array_equal(empty.ap_per_class, [0.0, np.nan])
    assert np.isnan(evaluate_coco([found([box], [0.5])], [truth([])], 2).ap)
    assert np.isnan(evaluate_coco([found([box], [0.5])], [truth([box], difficult=[True])], 2).ap)
    assert np.isnan(evaluate_coco([], [], 2).ap)


def test_prints_nothing(capsys):
    evaluate_coco([found([[0, 0, 5, 5]], [0.5])], [truth([[0, 0, 5, 5]])], 1)
    assert capsys.readouterr() == ("", "")


def test_arrays_given_are_left_alone():
    detections, ground_truth = random_images(np.random.default_rng(0), 3, 2)
    before = [a.copy() for d in detections for a in d] + [g.boxes.copy() for g in ground_truth]
    evaluate_coco(detections, ground_truth, 2)
    after = [a for d in detections for a in d] + [g.boxes for g in ground_truth]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
