"""What changed between two detectors: by hand, and by rules that hold for any two."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.error_changes import compare_errors
from tinydet.evaluation.tide import tide

A, B, C, FAR = [0, 0, 10, 10], [50, 0, 60, 10], [100, 0, 110, 10], [200, 200, 220, 220]


def _truth(boxes, labels=None):
    count = len(boxes)
    boxes = np.array(boxes, float).reshape(-1, 4)
    return GroundTruth(boxes, np.array(labels or [0] * count, int), np.zeros(count, bool))


def _found(*rows):
    boxes = np.array([row[0] for row in rows], float).reshape(-1, 4)
    scores = np.array([row[1] for row in rows], float)
    return ImageDetections(boxes, scores, np.array([row[2] for row in rows], int))


def test_boxes_and_false_detections_that_come_and_go():
    truth = [_truth([A, B, C]), _truth([A]), _truth([A])]
    near_far = [200, 200, 220, 215]
    base = [
        _found((A, 0.9, 0), (B, 0.8, 0), (FAR, 0.7, 0), (C, 0.6, 1)),
        _found((FAR, 0.5, 0)),
        _found((A, 0.9, 0)),
    ]
    idea = [
        _found((A, 0.9, 0), (C, 0.4, 0), (near_far, 0.6, 0), (FAR, 0.5, 1)),
        _found((A, 0.5, 0), (B, 0.2, 0)),  # B is too unsure to count
        _found((A, 0.9, 0), (A, 0.4, 0)),
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
        compare_errors([_found()], [_found()] * 2, [_truth([A])], 1)


_rows = st.lists(
    st.tuples(st.sampled_from([A, B, C, FAR, [0, 0, 10, 6]]), st.integers(0, 9), st.integers(0, 1)),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(first=_rows, second=_rows, boxes=st.lists(st.sampled_from([A, B, C]), max_size=4))
def test_the_way_back_is_the_opposite(first, second, boxes):
    one, other = ([_found(*((b, s / 9, k) for b, s, k in rows))] for rows in (first, second))
    truth = [_truth(boxes)]
    (there,), (back,) = (compare_errors(*p, truth, 2).images for p in ((one, other), (other, one)))
    assert there.gain == pytest.approx(-back.gain)
    np.testing.assert_array_equal(there.found, back.lost)
    np.testing.assert_array_equal(there.new, back.gone)
    assert there.idea.missed.sum() - there.base.missed.sum() == there.lost.sum() - there.found.sum()
    (same,) = compare_errors(one, one, truth, 2).images
    assert not any(part.any() for part in (same.found, same.lost, same.new, same.gone))
