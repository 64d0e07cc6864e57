"""Weighted average precision: the metrics' own on test sets that really hold the copies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.coco import evaluate_coco, match_coco
from tinydet.evaluation.voc import evaluate_voc
from tinydet.evaluation.weighted import (
    voc_matches,
    weighted_area_ap,
    weighted_coco_ap,
)

_CLASSES = 3


def split(seed, num_images, crowds=False, digits=None):
    """Return detections and ground truth with misses, duplicates, difficult boxes, empty images.

    Scores of a few `digits` are often equal, within an image and across images.
    """
    rng = np.random.default_rng(seed)
    detections, ground_truth = [], []
    for _ in range(num_images):
        boxes = rng.uniform(0, 60, (rng.integers(0, 6), 2))
        boxes = np.concatenate([boxes, boxes + rng.uniform(8, 40, boxes.shape)], axis=1)
        labels = rng.integers(0, _CLASSES, len(boxes))
        difficult = rng.random(len(boxes)) < 0.2
        crowd = difficult & (rng.random(len(boxes)) < 0.5) if crowds else None
        ground_truth.append(GroundTruth(boxes, labels, difficult, crowd))
        copies = np.repeat(np.arange(len(boxes)), rng.integers(0, 4, len(boxes)))
        noise = rng.normal(0, rng.choice([0.5, 4]), (len(copies), 4))
        extra = rng.uniform(0, 60, (rng.integers(0, 4), 2))
        extra = np.concatenate([extra, extra + rng.uniform(8, 40, extra.shape)], axis=1)
        found = np.concatenate([boxes[copies] + noise, extra])
        wrong = rng.integers(0, _CLASSES, len(found))
        labels = np.where(
            rng.random(len(found)) < 0.2, wrong, [*labels[copies], *wrong[len(copies) :]]
        )
        scores = rng.random(len(found))
        scores = scores if digits is None else scores.round(digits)
        detections.append(ImageDetections(found, scores, labels))
    return detections, ground_truth


def repeated(items, weights):
    return [item for item, times in zip(items, weights, strict=True) for _ in range(times)]


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    crowds=st.booleans(),
    digits=st.sampled_from([None, 2, 1, 0]),
)
def test_weights_are_copies(seed, crowds, digits):
    detections, truth = split(seed, 7, crowds, digits)
    rng = np.random.default_rng(seed)
    weights = np.vstack([np.ones((1, 7), int), rng.multinomial(7, np.full(7, 1 / 7), size=3)])
    voc = weighted_area_ap(voc_matches(detections, truth, _CLASSES), weights)
    coco = weighted_coco_ap(match_coco(detections, truth, _CLASSES), weights)
    for i, of_image in enumerate(weights):
        copied = repeated(detections, of_image), repeated(truth, of_image)
        expected = evaluate_voc(*copied, _CLASSES).mean_area
        np.testing.assert_allclose(voc[i], expected, rtol=1e-12, equal_nan=True)
        expected = evaluate_coco(*copied, _CLASSES).ap
        np.testing.assert_allclose(coco[i], expected, rtol=1e-9, equal_nan=True)


def test_copies_of_an_image_whose_right_and_wrong_detections_tie():
    # Two copies: right, wrong, right, wrong. The second box is found at a precision of 2 / 3.
    truth = [GroundTruth(np.array([[0.0, 0, 10, 10]]), np.array([0]), np.array([False]))]
    boxes = np.array([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    detections = [ImageDetections(boxes, np.array([0.5, 0.5]), np.array([0, 0]))]
    weights = np.array([[1], [2], [0], [1.5]])
    expected = [1, (1 + 2 / 3) / 2, np.nan, (1 + 0.5 * 1.5 / 2.5) / 1.5]
    values = weighted_area_ap(voc_matches(detections, truth, 1), weights)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    values = weighted_coco_ap(match_coco(detections, truth, 1), weights[:2])
    np.testing.assert_allclose(values, [1, (51 + 50 * 2 / 3) / 101], rtol=1e-12)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 7), digits=st.sampled_from([None, 1]))
def test_the_scale_of_weights_says_nothing(seed, scale, digits):
    detections, truth = split(seed, 7, digits=digits)
    if digits:  # Equal scores in different images alone: their copies keep their order.
        detections = [
            f._replace(scores=f.scores + 2 * np.arange(len(f.scores))) for f in detections
        ]
    weights = np.random.default_rng(seed).integers(0, 4, (3, 7)) * np.array([[1], [0.5], [0.3]])
    matches = voc_matches(detections, truth, _CLASSES)
    expected, scaled = (weighted_area_ap(matches, factor * weights) for factor in (1, scale))
    np.testing.assert_allclose(scaled, expected, rtol=1e-9, equal_nan=True)


def test_a_large_split_as_it_is_has_the_metrics_own_values():
    detections, truth = split(1, 400)
    once = np.ones((1, 400))
    (voc,) = weighted_area_ap(voc_matches(detections, truth, _CLASSES), once)
    assert voc == pytest.approx(evaluate_voc(detections, truth, _CLASSES).mean_area, rel=1e-12)
    (coco,) = weighted_coco_ap(match_coco(detections, truth, _CLASSES), once)
    assert coco == pytest.approx(evaluate_coco(detections, truth, _CLASSES).ap, rel=1e-12)


def test_recalls_that_floating_point_sees_below_a_threshold_are_pycocotools_own():
    # 57 of 100 boxes: numpy's threshold 0.57 is the next number above 57 / 100.
    box = np.array([[0.0, 0, 10, 10]])
    some, none = np.array([0]), np.zeros(0, np.int64)
    truth = [GroundTruth(box, some, np.array([False]))] * 100
    for found in (28, 29, 57, 58):
        detections = [
            ImageDetections(box, np.array([1 - i / 200]), some)
            if i < found
            else ImageDetections(np.zeros((0, 4)), np.zeros(0), none)
            for i in range(100)
        ]
        (ap,) = weighted_coco_ap(match_coco(detections, truth, 1), np.ones((1, 100)))
        assert ap == pytest.approx(evaluate_coco(detections, truth, 1).ap, rel=1e-12)


def test_a_class_without_boxes_in_a_test_set_is_left_out_of_its_mean():
    box, one = np.array([[0.0, 0, 10, 10]]), np.array([False])
    truth = [GroundTruth(box, np.array([label]), one) for label in (0, 1)]
    detections = [
        ImageDetections(box, np.array([0.9]), np.array([0])),
        ImageDetections(box + 100, np.array([0.9]), np.array([1])),
    ]
    weights = np.array([[1, 1], [2, 0], [0, 2], [0, 0]])
    values = weighted_area_ap(voc_matches(detections, truth, 2), weights)
    np.testing.assert_array_equal(values, [0.5, 1.0, 0.0, np.nan])
    values = weighted_coco_ap(match_coco(detections, truth, 2), weights)
    np.testing.assert_allclose(values, [0.5, 1.0, 0.0, np.nan], rtol=1e-12)


def test_no_detections_at_all():
    _, truth = split(0, 5)
    nothing = [ImageDetections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))] * 5
    weights = np.ones((2, 5))
    assert weighted_area_ap(voc_matches(nothing, truth, _CLASSES), weights).tolist() == [0, 0]
    assert weighted_coco_ap(match_coco(nothing, truth, _CLASSES), weights).tolist() == [0, 0]
