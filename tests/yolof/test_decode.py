import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.yolof.decode import decode_boxes, postprocess, sizes_in_input

SETTINGS = {"score_threshold": 0.05, "pre_nms_topk": 1000, "nms_iou": 0.6, "max_detections": 100}


@pytest.mark.parametrize("mode", ["extreme", "near_anchor"])
def test_boxes_are_the_reference(reference, outputs, mode):
    boxes = decode_boxes(reference["anchors"], outputs(mode)[1], center_clamp=32)
    torch.testing.assert_close(boxes, reference["head"][mode]["decoded"], rtol=1e-5, atol=1e-3)


def test_reference_has_deltas_past_every_clamp(reference, outputs):
    anchors, deltas = reference["anchors"], outputs("extreme")[1]
    moves = deltas[..., :2] * (anchors[:, 2:] - anchors[:, :2])
    assert moves.min() < -32
    assert moves.max() > 32
    assert deltas[..., 2:].max() > math.log(1000 / 16)
    assert deltas[..., 2:].min() < -math.log(1000 / 16)


@pytest.mark.parametrize(
    ("deltas", "box"),
    [
        ([0, 0, 0, 0], [100, 180, 200, 220]),
        ([0.1, -0.25, 0, 0], [110, 170, 210, 210]),
        ([0, 0, math.log(2), math.log(0.5)], [50, 190, 250, 210]),
        ([5, -5, 0, 0], [132, 148, 232, 188]),  # centre moved by 32 at most
        ([0, 0, 99, 99], [150 - 3125, 200 - 1250, 150 + 3125, 200 + 1250]),  # sides x 62.5
        ([0, 0, -99, -99], [150, 200, 150, 200]),  # no lower limit
    ],
)
def test_boxes_worked_by_hand(deltas, box):
    anchor = torch.tensor([[100.0, 180, 200, 220]])
    boxes = decode_boxes(anchor, torch.tensor([[deltas]]).float(), center_clamp=32)
    torch.testing.assert_close(boxes, torch.tensor([[box]]).float())


def assert_detections(found, expected, rtol=1e-4, atol=1e-2):
    assert len(found.scores) == len(expected["scores"])
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.labels, expected["labels"])
    torch.testing.assert_close(found.boxes, expected["boxes"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", ["extreme", "near_anchor"])
def test_detections_are_the_reference(reference, outputs, mode):
    cls_logits, deltas = outputs(mode)
    boxes = decode_boxes(reference["anchors"], deltas, 32)
    expected = reference["head"][mode]["predict"]
    assert max(len(image["scores"]) for image in expected) == 100
    for logits, image_boxes, expected_image in zip(cls_logits, boxes, expected, strict=True):
        found = postprocess(logits, image_boxes, (320, 416), **SETTINGS)
        assert_detections(found, expected_image)


def test_few_faint_detections_are_the_reference(reference, outputs):
    cls_logits, deltas = outputs("eval")
    boxes = decode_boxes(reference["anchors"], deltas, 32)
    for i, image in enumerate(reference["head"]["predict"]["plain"]):
        size = reference["head"]["predict"]["metas"][i]["img_shape"]
        assert_detections(postprocess(cls_logits[i], boxes[i], size, **SETTINGS), image)


def slow_postprocess(scores, boxes, size, threshold, candidates, nms_iou, limit):
    """The same in plain Python; scores is a list of rows, one an anchor."""

    def iou(a, b):
        sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
        overlap = max(0, sides[0]) * max(0, sides[1])
        areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        return overlap / (sum(areas) - overlap)

    pairs = [(s, a, k) for a, row in enumerate(scores) for k, s in enumerate(row) if s > threshold]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:candidates]
    kept = []
    for score, a, k in pairs:
        box = [min(max(v, 0), size[1 - i % 2]) for i, v in enumerate(boxes[a])]
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        if all(k != other or iou(box, b) <= nms_iou for _, b, other in kept):
            kept.append((score, box, k))
    return kept[:limit]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.sampled_from([1, 5, 1000]),
    st.sampled_from([1, 4, 100]),
    st.booleans(),
)
def test_agrees_with_slow_selection(seed, num_classes, candidates, limit, ties):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(40, 2, generator=generator) * 60 - 15
    boxes = torch.cat([corners, corners + torch.rand(40, 2, generator=generator) * 40], -1)
    count = 40 * num_classes
    ranks = torch.randperm(count, generator=generator).reshape(40, -1) + 1
    logits = ((ranks // 9 * 9 + 1 if ties else ranks) / (count + 9)).logit()
    found = postprocess(logits, boxes, (30, 40), 0.3, candidates, 0.4, limit)
    # Python's sort is stable too: of equal scores the first comes first.
    scores = logits.sigmoid().tolist()
    expected = slow_postprocess(scores, boxes.tolist(), (30, 40), 0.3, candidates, 0.4, limit)
    assert found.labels.tolist() == [k for _, _, k in expected]
    assert found.scores.tolist() == [s for s, _, _ in expected]
    rows = torch.tensor([b for _, b, _ in expected]).reshape(-1, 4)
    torch.testing.assert_close(found.boxes, rows)


def test_nothing_above_threshold_gives_empty_detections_of_the_right_shape():
    found = postprocess(torch.full((3, 4), -9.0), torch.zeros(3, 4), (32, 32), **SETTINGS)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.labels.dtype == torch.int64


def test_box_outside_the_image_is_dropped_and_takes_no_place():
    boxes = torch.tensor([[40.0, 0, 50, 10], [0, 0, 10, 10]])
    logits = torch.tensor([[3.0], [2.0]])
    found = postprocess(logits, boxes, (32, 32), **{**SETTINGS, "max_detections": 1})
    torch.testing.assert_close(found.boxes, boxes[1:])


def test_overlap_is_that_of_the_clipped_boxes():
    boxes = torch.tensor([[0.0, 0, 30, 10], [0, 0, 60, 10]])  # IoU 0.5; 0.75 of what is visible
    logits = torch.tensor([[2.0], [1.0]])
    assert len(postprocess(logits, boxes, (10, 60), **SETTINGS).scores) == 2
    assert len(postprocess(logits, boxes, (10, 40), **SETTINGS).scores) == 1


def test_score_at_the_threshold_is_not_enough():
    box = torch.tensor([[0.0, 0, 10, 10]])
    settings_ = {**SETTINGS, "score_threshold": 0.5}
    found = postprocess(torch.zeros(1, 1), box, (32, 32), **settings_)
    assert len(found.scores) == 0


@pytest.mark.parametrize(
    ("sizes", "scales", "expected"),
    [
        (None, [(2.0, 0.5)] * 2, [(64, 96), (64, 96)]),
        ([(50, 60), (90, 20)], None, [(50, 60), (64, 20)]),
        ([(32, 48), (128, 48)], [(2.0, 1.5), (0.5, 0.25)], [(64, 72), (64, 12)]),
    ],
)
def test_sizes_in_input(sizes, scales, expected):
    assert sizes_in_input(torch.zeros(2, 3, 64, 96), sizes, scales) == expected
