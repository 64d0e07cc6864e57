"""VOC average precision: by hand, against a slow version of the devkit, and against pycocotools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.coco import evaluate_coco
from tinydet.evaluation.voc import eleven_point_ap, evaluate_voc, interpolated_precision

BOX = [0, 0, 10, 10]
FAR = [100, 100, 120, 120]
HALF = [0, 0, 10, 5]  # IoU with BOX is exactly 0.5


def truth(boxes, labels=None, difficult=None):
    count = len(boxes)
    return GroundTruth(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.zeros(count, np.int64) if labels is None else np.array(labels),
        np.zeros(count, bool) if difficult is None else np.array(difficult),
    )


def found(boxes, scores, labels=None):
    return ImageDetections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.zeros(len(boxes), np.int64) if labels is None else np.array(labels),
    )


def one_class(detections, ground_truth, **kwargs):
    result = evaluate_voc([detections], [ground_truth], 1, **kwargs)
    return result.ap_area[0], result.ap_11pt[0]


def test_perfect_detections_score_one():
    assert one_class(found([BOX, FAR], [0.9, 0.1]), truth([FAR, BOX])) == (1.0, 1.0)


def test_curve_worked_by_hand():
    # Right, wrong, right, then one of four boxes is never found:
    # precision 1, 1/2, 2/3 (right), 3/4 (right) at recall 1/4, 1/4, 2/4, 3/4.
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(4)]
    area, eleven = one_class(
        found([boxes[0], FAR, boxes[1], boxes[2]], [0.9, 0.8, 0.7, 0.6]), truth(boxes)
    )
    # The envelope is 1 up to recall 1/4 and 3/4 up to recall 3/4.
    assert area == pytest.approx(1 / 4 + 2 / 4 * 3 / 4)
    # Recalls 0, .1, .2 see 1; .3 to .7 see 3/4; .8, .9, 1 see 0.
    assert eleven == pytest.approx((3 * 1 + 5 * 3 / 4) / 11)


def test_eleven_points_reach_a_recall_of_three_tenths():
    # In floating point 3 * 0.1 > 3 / 10: the precision at the fourth point must not be lost.
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(10)]
    _, eleven = one_class(found(boxes[:3], [0.9, 0.8, 0.7]), truth(boxes))
    assert eleven == pytest.approx(4 / 11)


def test_iou_of_exactly_one_half_counts():
    assert one_class(found([HALF], [0.9]), truth([BOX])) == (1.0, 1.0)
    assert one_class(found([[0, 0, 10, 4.99]], [0.9]), truth([BOX])) == (0.0, 0.0)
    assert one_class(found([HALF], [0.9]), truth([BOX]), iou=0.51) == (0.0, 0.0)


def test_second_detection_of_a_box_is_wrong():
    # Duplicate between the two right ones: precision 1, 1/2, 2/3.
    area, _ = one_class(found([BOX, HALF, FAR], [0.9, 0.8, 0.7]), truth([BOX, FAR]))
    assert area == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_detection_of_a_taken_box_does_not_get_the_next_best_box():
    # Both detections overlap the first box most; both would also do for the second box.
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9]]
    area, _ = one_class(found([BOX, BOX], [0.9, 0.8]), truth(boxes))
    assert area == pytest.approx(1 / 2)


def test_boxes_of_equal_iou_take_the_first():
    # Twice the same box, first one difficult: the detection belongs to the difficult one.
    boxes = [BOX, BOX]
    assert one_class(found([BOX], [0.9]), truth(boxes, difficult=[True, False]))[0] == 0.0
    assert one_class(found([BOX], [0.9]), truth(boxes, difficult=[False, True]))[0] == 1.0


def test_difficult_boxes_count_neither_way():
    ground_truth = truth([BOX, FAR], difficult=[True, False])
    # Two detections of the difficult box come first; neither is a false positive.
    assert one_class(found([BOX, HALF, FAR], [0.9, 0.8, 0.7]), ground_truth) == (1.0, 1.0)
    # A missed difficult box costs no recall.
    assert one_class(found([FAR], [0.9]), ground_truth) == (1.0, 1.0)
    # A detection that only touches it is wrong all the same.
    touching = [0, 0, 10, 4]
    assert one_class(found([touching, FAR], [0.9, 0.8]), ground_truth)[0] == pytest.approx(1 / 2)


def test_equal_scores_keep_the_order_given():
    wrong_first = found([FAR, BOX], [0.5, 0.5])
    right_first = found([BOX, FAR], [0.5, 0.5])
    assert one_class(wrong_first, truth([BOX]))[0] == pytest.approx(1 / 2)
    assert one_class(right_first, truth([BOX]))[0] == 1.0
    images = [truth([]), truth([BOX])]
    result = evaluate_voc([found([BOX], [0.5]), found([BOX], [0.5])], images, 1)
    assert result.ap_area[0] == pytest.approx(1 / 2)


def test_classes_do_not_mix():
    # Right place, wrong class: wrong for the class said, missed for the class there.
    result = evaluate_voc(
        [found([BOX, FAR], [0.9, 0.8], labels=[0, 1])], [truth([BOX, FAR], labels=[1, 1])], 3
    )
    assert np.isnan(result.ap_area[[0, 2]]).all()
    assert result.ap_area[1] == pytest.approx(1 / 2)
    assert result.num_boxes.tolist() == [0, 2, 0]


def test_boxes_of_other_images_do_not_count():
    result = evaluate_voc([found([BOX], [0.9]), found([], [])], [truth([]), truth([BOX])], 1)
    assert result.ap_area[0] == 0.0


def test_no_detections_is_zero_and_no_ground_truth_is_left_out():
    result = evaluate_voc(
        [found([BOX, BOX], [0.9, 0.8], labels=[0, 2])],
        [truth([BOX, FAR, BOX], labels=[0, 1, 3], difficult=[False, False, True])],
        4,
    )
    np.testing.assert_array_equal(result.ap_area, [1.0, 0.0, np.nan, np.nan])
    np.testing.assert_array_equal(result.ap_11pt, [1.0, 0.0, np.nan, np.nan])
    assert result.mean_area == result.mean_11pt == 0.5


def test_nothing_at_all_is_nan_without_a_warning():
    with np.errstate(all="raise"):
        for images in (0, 2):
            result = evaluate_voc([found([], [])] * images, [truth([])] * images, 2)
            assert np.isnan([result.mean_area, result.mean_11pt]).all()


def test_inclusive_pixels_of_the_devkit_give_the_same_iou():
    # By the devkit's +1 formula this pair has an IoU of exactly 0.5.
    annotation, detection = (1, 1, 10, 10), (1, 1, 10, 5)  # 10 x 10 and 10 x 5 pixels
    boxes = [[x1 - 1, y1 - 1, x2, y2] for x1, y1, x2, y2 in (annotation, detection)]
    assert one_class(found([boxes[1]], [0.9]), truth([boxes[0]])) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("detections", "ground_truth", "message"),
    [
        ([], [truth([BOX])], "0 images"),
        ([(np.zeros((1, 5)), [0.5], [0])], [truth([])], "image 0: boxes have shape"),
        ([found([BOX], [0.5], [1])], [truth([])], "detections of image 0: a label is outside"),
        ([found([BOX], [np.nan])], [truth([])], "a score is not finite"),
        ([found([[0, 0, np.inf, 1]], [0.5])], [truth([])], "a box is not finite"),
        ([found([BOX], [0.5, 0.6])], [truth([])], "scores have shape"),
        ([found([], [])], [truth([BOX], labels=[-1])], "ground truth of image 0: a label"),
        ([found([], [])], [truth([BOX], difficult=[])], "difficult have shape"),
    ],
)
def test_bad_inputs_are_refused_by_name(detections, ground_truth, message):
    with pytest.raises(ValueError, match=message):
        evaluate_voc(detections, ground_truth, 1)


# Coordinates from a small grid make exact ties and IoUs of exactly 0.5 common.
corners = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 4)] * 2)
boxes_strategy = corners.map(lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3]))
truth_strategy = st.lists(st.tuples(boxes_strategy, st.integers(0, 2), st.booleans()), max_size=6)
found_strategy = st.lists(
    st.tuples(boxes_strategy, st.integers(1, 4), st.integers(0, 2)), max_size=10
)
images_strategy = st.lists(st.tuples(found_strategy, truth_strategy), max_size=4)


def as_arrays(images):
    detections = [
        found([d[0] for d in ds], [d[1] / 4 for d in ds], [d[2] for d in ds]) for ds, _ in images
    ]
    ground_truth = [
        truth([g[0] for g in gs], [g[1] for g in gs], [g[2] for g in gs]) for _, gs in images
    ]
    return detections, ground_truth


def slow_ap(images, label):
    """VOCevaldet.m and VOCap.m in plain Python, for 1-based inclusive boxes as in its files."""
    boxes = [[(g, hard) for g, cls, hard in gs if cls == label] for _, gs in images]
    positives = sum(not hard for image in boxes for _, hard in image)
    if not positives:
        return None
    listed = [(s, i, d) for i, (ds, _) in enumerate(images) for d, s, cls in ds if cls == label]
    listed.sort(key=lambda entry: -entry[0])  # Python's sort is stable
    taken, tp, fp, curve = set(), 0, 0, []
    for _, image, (x1, y1, x2, y2) in listed:
        x1, y1 = x1 + 1, y1 + 1
        best, match = -1.0, None
        for j, ((gx1, gy1, gx2, gy2), _) in enumerate(boxes[image]):
            gx1, gy1 = gx1 + 1, gy1 + 1
            iw, ih = min(x2, gx2) - max(x1, gx1) + 1, min(y2, gy2) - max(y1, gy1) + 1
            if iw > 0 and ih > 0:
                union = (x2 - x1 + 1) * (y2 - y1 + 1) + (gx2 - gx1 + 1) * (gy2 - gy1 + 1) - iw * ih
                if iw * ih / union > best:
                    best, match = iw * ih / union, j
        if best >= 0.5:
            if not boxes[image][match][1]:
                tp, fp = (tp, fp + 1) if (image, match) in taken else (tp + 1, fp)
                taken.add((image, match))
        else:
            fp += 1
        if tp + fp:
            curve.append((tp, tp / (tp + fp)))
    eleven = 0.0
    for tenth in range(11):
        eleven += max([p for t, p in curve if 10 * t >= tenth * positives], default=0.0) / 11
    area, reached = 0.0, 0
    for index, (t, _) in enumerate(curve):
        area += (t - reached) / positives * max(p for _, p in curve[index:])
        reached = t
    return area, eleven


@settings(max_examples=80, deadline=None)
@given(images_strategy)
def test_agrees_with_a_slow_devkit(images):
    result = evaluate_voc(*as_arrays(images), 3)
    for label in range(3):
        expected = slow_ap(images, label)
        if expected is None:
            assert np.isnan([result.ap_area[label], result.ap_11pt[label]]).all()
        else:
            actual = result.ap_area[label], result.ap_11pt[label]
            assert actual == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_agrees_with_pycocotools_at_one_half(seed, num_images):
    """Boxes far apart, where the two matching rules are the same; COCO samples 101 recalls."""
    rng = np.random.default_rng(seed)
    detections, ground_truth = [], []
    for _ in range(num_images):
        count = rng.integers(0, 6)
        start = np.stack([100 * np.arange(count), np.zeros(count)], 1) + rng.uniform(0, 10, 2)
        boxes = np.concatenate([start, start + rng.uniform(20, 60, (count, 2))], 1)
        labels, hard = rng.integers(0, 3, count), rng.random(count) < 0.2
        ground_truth.append(truth(boxes, labels, hard))
        copies = np.repeat(np.arange(count), rng.integers(0, 4, count))
        jittered = boxes[copies] + rng.normal(0, 4, (len(copies), 4))
        labels = np.where(rng.random(len(copies)) < 0.2, rng.integers(0, 3), labels[copies])
        detections.append(found(jittered, rng.random(len(copies)), labels))
    voc, coco = (f(detections, ground_truth, 3) for f in (evaluate_voc, evaluate_coco))
    # The curve falls from at most 1 to 0, so sampling it at steps of 0.01 is off by at most 0.01;
    # as much again for recalls that miss their sample by a rounding error.
    assert coco.ap50 == pytest.approx(voc.mean_area, abs=0.02, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(right=st.lists(st.booleans(), max_size=30), missed=st.integers(0, 12))
def test_curve_is_the_best_precision_at_each_recall_or_beyond(right, missed):
    true_positives = np.cumsum(np.array(right, int))
    boxes = sum(right) + missed
    if not boxes:
        return
    curve = interpolated_precision(true_positives, boxes)
    for k in range(101):
        beyond = [tp / n for n, tp in enumerate(true_positives, 1) if 100 * tp >= k * boxes]
        assert curve[k] == pytest.approx(max(beyond, default=0.0))
    assert eleven_point_ap(true_positives, boxes) == pytest.approx(np.mean(curve[::10]))
