"""Errors of an image: by hand, and against counts that follow from the metric's own curve."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.errors import image_errors
from tinydet.evaluation.voc import evaluate_voc

A, B, FAR = [0, 0, 10, 10], [50, 0, 60, 10], [100, 100, 120, 120]


def _truth(boxes, labels, difficult=None):
    difficult = [False] * len(boxes) if difficult is None else difficult
    return GroundTruth(
        np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(difficult, bool)
    )


def _found(boxes, scores, labels):
    return ImageDetections(
        np.array(boxes, float).reshape(-1, 4), np.array(scores, float), np.array(labels, int)
    )


def test_missed_false_duplicate_and_ignored_are_told_apart():
    truth = _truth([A, B, FAR], [0, 1, 0], [False, False, True])
    found = _found([A, A, B, FAR, B], [0.9, 0.8, 0.7, 0.6, 0.2], [0, 0, 0, 0, 1])
    (errors,) = image_errors([found], [truth], 2, min_score=0.3)
    # The second A is a duplicate, B has the wrong class, FAR is difficult; the right B is unsure.
    assert errors.wrong.tolist() == [False, True, True, False]
    assert errors.missed.tolist() == [False, True, False]
    assert errors.badness == pytest.approx(1 + 0.8 + 0.7)


def test_images_without_anything_are_without_errors():
    empty = (_found([], [], []), _truth([], []))
    one = (_found([A], [0.5], [0]), _truth([], []))
    two = (_found([], [], []), _truth([A], [0]))
    errors = image_errors(*zip(empty, one, empty, two, strict=True), 1)
    assert [e.badness for e in errors] == [0, 0.5, 0, 1]
    assert image_errors([], [], 1) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 4))
def test_sums_over_images_are_those_of_the_metric(seed, images):
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner = rng.integers(0, 3, (count, 2)) * 6.0
        return np.concatenate([corner, corner + rng.integers(5, 12, (count, 2))], axis=1)

    truth, found = [], []
    for _ in range(images):
        n, m = rng.integers(0, 5, 2)
        truth.append(_truth(boxes(n), rng.integers(0, 2, n), rng.random(n) < 0.3))
        found.append(_found(boxes(m), rng.integers(1, 5, m) / 5, rng.integers(0, 2, m)))
    errors = image_errors(found, truth, 2, min_score=0.0)
    result = evaluate_voc(found, truth, 2)
    for label in range(2):
        curve, total = result.true_positives[label], int(result.num_boxes[label])
        if not total:
            continue
        right = int(curve[-1]) if len(curve) else 0
        missed = sum(int((e.missed & (e.truth.labels == label)).sum()) for e in errors)
        wrong = sum(int((e.wrong & (e.detections.labels == label)).sum()) for e in errors)
        assert missed == total - right
        assert wrong == len(curve) - right
