"""Kinds of errors: one at a time by hand, by mending the detections themselves."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.tide import KINDS, SIZES, SUMS, tide
from tinydet.evaluation.voc import evaluate_voc


def _truth(boxes, labels, difficult=None, areas=None):
    difficult = [False] * len(boxes) if difficult is None else difficult
    boxes = np.array(boxes, float).reshape(-1, 4)
    return GroundTruth(boxes, np.array(labels, int), np.array(difficult, bool), areas=areas)


def _found(boxes, scores, labels):
    boxes = np.array(boxes, float).reshape(-1, 4)
    return ImageDetections(boxes, np.array(scores, float), np.array(labels, int))


# Four boxes of class 0, 20 x 20 but for the last, 100 x 100; one of class 1, 50 x 50.
BOXES = [
    [0, 0, 20, 20],
    [100, 0, 120, 20],
    [200, 0, 220, 20],
    [300, 0, 400, 100],
    [0, 200, 50, 250],
]
LABELS = [0, 0, 0, 0, 1]
NEAR_LAST = [300, 0, 400, 30]  # IoU 0.3 with it


def _lost(changed=(), left_out=(), **truth):
    """Find every box at scores 0.8, 0.7, ... but for some; `changed` is added to them."""
    found = [(b, 0.8 - 0.1 * i, k) for i, (b, k) in enumerate(zip(BOXES, LABELS, strict=True))]
    found = [d for i, d in enumerate(found) if i not in left_out] + list(changed)
    return tide([_found(*zip(*found, strict=True))], [_truth(BOXES, LABELS, **truth)], 2)


@pytest.mark.parametrize(
    ("kind", "size", "changed", "left_out", "ap50", "lost"),
    [
        # Class 0 finds 3 of 4 at precision 1, class 1 its box behind a false one.
        ("classification", "large", [(BOXES[3], 0.9, 1)], [3], [3 / 4, 1 / 2], [1 / 4, 1 / 2]),
        # 3 of 4 behind a false one, all 4 when it is moved.
        ("localisation", "large", [(NEAR_LAST, 0.9, 0)], [3], [9 / 16, 1], [7 / 16, 0]),
        # 4 behind a false one; its own area is 3000.
        ("both", "medium", [(NEAR_LAST, 0.9, 1)], [], [1, 1 / 2], [0, 1 / 2]),
        ("background", "small", [([500, 0, 510, 10], 0.9, 0)], [], [4 / 5, 1], [1 / 5, 0]),
        # Right, false, right, right, right.
        (
            "duplicate",
            "small",
            [([0, 0, 20, 10], 0.75, 0)],
            [],
            [(1 + 3 * 4 / 5) / 4, 1],
            [0.15, 0],
        ),
        ("missed", "large", [], [3], [3 / 4, 1], [1 / 4, 0]),
    ],
)
def test_one_error_is_one_kind_of_error(kind, size, changed, left_out, ap50, lost):
    result = _lost(changed, left_out)
    assert result.counts == {**dict.fromkeys(KINDS, 0), kind: 1}
    np.testing.assert_allclose(result.ap50_per_class, ap50)
    np.testing.assert_allclose(result.lost_per_class[kind], lost)
    assert result.ap50 == pytest.approx(np.mean(ap50))
    assert {k: v for k, v in result.lost.items() if v and k in KINDS} == {
        kind: pytest.approx(np.mean(lost))
    }
    assert result.lost_by_size == {
        name: result.lost if name == size else dict.fromkeys(result.lost, 0) for name in SIZES
    }


def test_all_of_precision_and_all_of_recall():
    # One of four missed, one false detection in front: 3 of 4 at precision 3/4.
    result = _lost([([500, 0, 510, 10], 0.9, 0)], [3])
    assert result.ap50_per_class[0] == pytest.approx(9 / 16)
    assert result.lost_per_class["false positive"][0] == pytest.approx(3 / 4 - 9 / 16)
    assert result.lost_per_class["false negative"][0] == pytest.approx(3 / 4 - 9 / 16)


def test_the_surest_claim_to_a_box_is_the_right_one():
    # The last box is found at 0.5, and badly localised at 0.9 and 0.4.
    found_too = _lost([(NEAR_LAST, 0.9, 0), (NEAR_LAST, 0.4, 0)])
    assert found_too.ap50_per_class[0] == pytest.approx(4 / 5)
    assert found_too.lost_per_class["localisation"][0] == pytest.approx(1 / 5)
    assert found_too.counts["localisation"] == 2
    # Put right, it keeps its score: before a false detection, not behind it.
    false = ([500, 0, 510, 10], 0.85, 0)
    moved = _lost([(NEAR_LAST, 0.9, 0), false])
    assert moved.ap50_per_class[0] == pytest.approx(4 / 6)
    assert moved.lost_per_class["localisation"][0] == pytest.approx((1 + 3 * 4 / 5) / 4 - 4 / 6)
    # A classification error of the same box is not in the way of mending the localisation.
    both_ways = _lost([(BOXES[3], 0.95, 1), (NEAR_LAST, 0.9, 0)], [3])
    assert both_ways.lost_per_class["localisation"][0] == pytest.approx(7 / 16)
    assert both_ways.counts["missed"] == 0


def test_what_is_about_a_difficult_box_is_left_out():
    difficult = [False] * 3 + [True, False]
    result = _lost([(NEAR_LAST, 0.9, 0), (BOXES[3], 0.95, 1)], [3], difficult=difficult)
    assert result.counts == {**dict.fromkeys(KINDS, 0), "classification": 1, "localisation": 1}
    np.testing.assert_allclose(result.lost_per_class["localisation"], [1 / 4, 0])
    np.testing.assert_allclose(result.lost_per_class["classification"], [0, 1 / 2])


def test_thresholds_belong_to_the_better_side():
    def kind(box, label):
        counts = tide([_found([box], [0.9], [label])], [_truth([[0, 0, 100, 10]], [0])], 2).counts
        return next((k for k in KINDS[:-1] if counts[k]), "right")

    assert kind([0, 0, 100, 5], 0) == "right"
    assert kind([0, 0, 100, 4.99], 0) == "localisation"
    assert kind([0, 0, 100, 1], 0) == "localisation"  # IoU 0.1
    assert kind([0, 0, 100, 0.99], 0) == "background"
    assert kind([0, 0, 100, 5], 1) == "classification"
    assert kind([0, 0, 100, 4.99], 1) == "both"
    assert kind([0, 0, 100, 1], 1) == "background"


def test_sizes_are_those_of_coco():
    sides = [(31.99, "small"), (32, "medium"), (96, "medium"), (96.01, "large")]
    for side, size in sides:
        missed = tide([_found([], [], [])], [_truth([[0, 0, side, side]], [0])], 1)
        assert [s for s in SIZES if missed.lost_by_size[s]["missed"]] == [size]
    stated = _truth([[0, 0, 100, 100]], [0], areas=np.array([50.0]))
    assert tide([_found([], [], [])], [stated], 1).lost_by_size["small"]["missed"] == 1


def test_a_class_with_nothing_left_to_find():
    nothing = tide([_found([], [], [])], [_truth([[0, 0, 9, 9]], [0])], 2)
    assert nothing.ap50 == 0
    assert nothing.lost["missed"] == nothing.lost["false negative"] == 1
    false = tide([_found([[50, 0, 59, 9]], [0.5], [0])], [_truth([[0, 0, 9, 9]], [0])], 2)
    assert set(false.lost.values()) == {0}


def test_no_ground_truth_is_nan_without_a_warning():
    with np.errstate(all="raise"):
        for images in (0, 2):
            result = tide([_found([], [], [])] * images, [_truth([], [])] * images, 2)
            assert np.isnan([result.ap50, *result.lost.values()]).all()
    with pytest.raises(ValueError, match="image 0: a label is outside"):
        tide([_found([[0, 0, 9, 9]], [0.5], [7])], [_truth([], [])], 2)


# Small grids make ties, boxes that are the same, and IoUs of exactly 0.1 and 0.5 common.
_corners = st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(1, 5)] * 2)
_boxes = _corners.map(lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3]))
_images = st.lists(
    st.tuples(
        st.lists(st.tuples(_boxes, st.integers(1, 4), st.integers(0, 2)), max_size=9),
        st.lists(st.tuples(_boxes, st.integers(0, 2), st.booleans()), max_size=6),
    ),
    max_size=3,
)


def _iou(a, b):
    sides = [max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    overlap = sides[0] * sides[1]
    return overlap / (sum(areas) - overlap)


def _slowly_judged(images):
    """Tell errors apart one detection at a time.

    Returns a list of [image, detection, kind or "right" or "ignored", box] by score, where box is
    None or (image, number); and the boxes that count and are not found.
    """
    rows = [[i, d, None, None] for i, (found, _) in enumerate(images) for d in found]
    rows.sort(key=lambda row: -row[1][1])
    taken = set()
    for row in rows:
        image, (box, _, label) = row[0], row[1]
        own, other = [], []
        for j, (annotated, cls, difficult) in enumerate(images[image][1]):
            (own if cls == label else other).append((_iou(box, annotated), -j, difficult))
        own, other = (max(ious, default=(0, 0, False)) for ious in (own, other))
        row[3] = (image, -own[1])
        if own[0] >= 0.5 and own[2]:
            row[2] = "ignored"
        elif own[0] >= 0.5 and row[3] not in taken:
            row[2] = "right"
            taken.add(row[3])
        elif 0.1 <= own[0] < 0.5:
            row[2] = "localisation"
        elif other[0] >= 0.5:
            row[2:] = ["classification", (image, -other[1])]
        elif own[0] >= 0.5:
            row[2] = "duplicate"
        else:
            row[2:] = ["background" if max(own[0], other[0]) <= 0.1 else "both", None]
    every = {(i, j) for i, (_, gs) in enumerate(images) for j, g in enumerate(gs) if not g[2]}
    return rows, every - taken


def _ap50(images, rows, unwanted=()):
    """Evaluate detections, by score, without some of the boxes; NaN for a class without boxes."""
    found = [[row[1] for row in rows if row[0] == i] for i in range(len(images))]
    kept = [
        [g for j, g in enumerate(gs) if (i, j) not in unwanted] for i, (_, gs) in enumerate(images)
    ]
    # Equal scores are told apart: their order is that of all images.
    order = {id(row[1]): n for n, row in enumerate(rows)}
    detections = [
        _found([d[0] for d in ds], [-order[id(d)] for d in ds], [d[2] for d in ds]) for ds in found
    ]
    truth = [_truth([g[0] for g in gs], [g[1] for g in gs], [g[2] for g in gs]) for gs in kept]
    return evaluate_voc(detections, truth, 3).ap_area


def _slowly_repaired(images, kind):
    rows, unfound = _slowly_judged(images)
    covered = {row[3] for row in rows if row[2] in ("localisation", "classification")}
    before = _ap50(images, rows)
    if kind in ("missed", "false negative"):
        after = _ap50(images, rows, unfound - covered if kind == "missed" else unfound)
        for label in np.flatnonzero(np.isnan(after) & ~np.isnan(before)):
            detected = any(row[1][2] == label and row[2] != "ignored" for row in rows)
            after[label] = 0.0 if detected else 1.0
        return after - before
    if kind == "false positive":
        rows = [row for row in rows if row[2] in ("right", "ignored")]
    elif kind in ("localisation", "classification"):
        kept, claimed = [], set()
        for image, (box, score, label), what, target in rows:
            if what in (kind, "right"):
                annotated, cls, difficult = images[image][1][target[1]]
                if target in claimed and not difficult:
                    continue
                claimed.add(target)
                if what == "localisation":
                    box = annotated
                label = cls
            kept.append([image, (box, score, label), what, target])
        rows = kept
    else:
        rows = [row for row in rows if row[2] != kind]
    return _ap50(images, rows) - before


@settings(max_examples=40, deadline=None)
@given(images=_images)
def test_the_oracles_are_those_of_mended_detections(images):
    detections, truth = [], []
    for ds, gs in images:  # 20 times as large, for objects of all sizes
        found = _found([d[0] for d in ds], [d[1] / 4 for d in ds], [d[2] for d in ds])
        detections.append(found._replace(boxes=20 * found.boxes))
        annotated = _truth([g[0] for g in gs], [g[1] for g in gs], [g[2] for g in gs])
        truth.append(replace(annotated, boxes=20 * annotated.boxes))
    result = tide(detections, truth, 3)
    np.testing.assert_array_equal(
        result.ap50_per_class, evaluate_voc(detections, truth, 3).ap_area, strict=True
    )
    for kind in KINDS + SUMS:
        np.testing.assert_allclose(
            result.lost_per_class[kind], _slowly_repaired(images, kind), atol=1e-12, err_msg=kind
        )
    rows, unfound = _slowly_judged(images)
    counts = Counter(row[2] for row in rows)
    assert all(result.counts[kind] == counts[kind] for kind in KINDS[:-1])
    covered = {row[3] for row in rows if row[2] in ("localisation", "classification")}
    assert result.counts["missed"] == len(unfound - covered)
    if not np.isnan(result.ap50):
        for kind in KINDS + SUMS:
            by_size = [result.lost_by_size[size][kind] for size in SIZES]
            steps = np.diff([0, max(by_size), result.lost[kind], 1 - result.ap50])
            assert (steps > -1e-12).all(), kind
