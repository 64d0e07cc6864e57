"""Errors of images and their changes: by hand, against the metric's curve, and by symmetry."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.errors import compare_errors, image_errors
from tinydet.evaluation.tide import tide
from tinydet.evaluation.voc import evaluate_voc

A, B, C, FAR = [0, 0, 10, 10], [50, 0, 60, 10], [100, 0, 110, 10], [200, 200, 220, 220]


def _truth(boxes, labels=None, difficult=None):
    labels = [0] * len(boxes) if labels is None else labels
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


@settings(max_examples=30, deadline=None)
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


def _rows(*rows):
    return _found(*([row[i] for row in rows] for i in range(3)))


def test_boxes_and_false_detections_that_come_and_go():
    truth = [_truth([A, B, C]), _truth([A]), _truth([A])]
    near_far = [200, 200, 220, 215]
    base = [
        _rows((A, 0.9, 0), (B, 0.8, 0), (FAR, 0.7, 0), (C, 0.6, 1)),
        _rows((FAR, 0.5, 0)),
        _rows((A, 0.9, 0)),
    ]
    idea = [
        _rows((A, 0.9, 0), (C, 0.4, 0), (near_far, 0.6, 0), (FAR, 0.5, 1)),
        _rows((A, 0.5, 0), (B, 0.2, 0)),  # B is too unsure to count
        _rows((A, 0.9, 0), (A, 0.4, 0)),
    ]
    changes = compare_errors(base, idea, truth, 2)
    first, second, third = changes.images
    assert first.found.tolist() == [False, False, True]
    assert first.lost.tolist() == [False, True, False]
    assert first.gone.tolist() == [False, False, False, True]  # FAR stays: the idea has it as well
    assert first.new.tolist() == [False, False, False, True]  # of another class it is another
    assert first.gain == pytest.approx(1 - 1 + 0.6 - 0.5)
    assert second.gain == pytest.approx(1 + 0.5)
    assert third.gain == pytest.approx(-0.4)
    assert [change.index for change in changes.improved] == [1, 0]
    assert [change.index for change in changes.worsened] == [2]
    assert changes.base.ap50 == tide(base, truth, 2).ap50
    assert changes.idea.lost == tide(idea, truth, 2).lost
    assert first.idea.kinds.tolist() == ["", "", "background", "background"]
    assert first.base.kinds.tolist() == ["", "", "background", "classification"]


def test_no_images_and_the_wrong_ones():
    changes = compare_errors([], [], [], 1)
    assert changes.improved == changes.worsened == changes.images == []
    with pytest.raises(ValueError, match="detections of 2 images for ground truth of 1"):
        compare_errors([_rows()], [_rows()] * 2, [_truth([A])], 1)


_any_rows = st.lists(
    st.tuples(st.sampled_from([A, B, C, FAR, [0, 0, 10, 6]]), st.integers(0, 9), st.integers(0, 1)),
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(first=_any_rows, second=_any_rows, boxes=st.lists(st.sampled_from([A, B, C]), max_size=4))
def test_the_way_back_is_the_opposite(first, second, boxes):
    one, other = ([_rows(*((b, s / 9, k) for b, s, k in rows))] for rows in (first, second))
    truth = [_truth(boxes)]
    (there,), (back,) = (compare_errors(*p, truth, 2).images for p in ((one, other), (other, one)))
    assert there.gain == pytest.approx(-back.gain)
    np.testing.assert_array_equal(there.found, back.lost)
    np.testing.assert_array_equal(there.new, back.gone)
    assert there.idea.missed.sum() - there.base.missed.sum() == there.lost.sum() - there.found.sum()
    (same,) = compare_errors(one, one, truth, 2).images
    assert not any(part.any() for part in (same.found, same.lost, same.new, same.gone))
