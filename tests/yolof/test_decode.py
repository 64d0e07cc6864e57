import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.yolof.decode import decode_boxes, postprocess

SETTINGS = {"score_threshold": 0.05, "candidates": 1000, "nms_iou": 0.6, "max_detections": 100}


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
    found = postprocess(cls_logits, boxes, (320, 416), **SETTINGS)
    for image, expected_image in zip(found, expected, strict=True):
        assert_detections(image, expected_image)


def test_few_faint_detections_are_the_reference(reference, outputs):
    cls_logits, deltas = outputs("eval")
    boxes = decode_boxes(reference["anchors"], deltas, 32)
    for i, image in enumerate(reference["head"]["predict"]["plain"]):
        size = reference["head"]["predict"]["metas"][i]["img_shape"]
        (found,) = postprocess(cls_logits[i : i + 1], boxes[i : i + 1], size, **SETTINGS)
        assert_detections(found, image)


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
    st.integers(1, 3),
    st.sampled_from([1, 5, 1000]),
    st.sampled_from([1, 4, 100]),
)
def test_agrees_with_slow_selection(seed, num_images, num_classes, candidates, limit):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_images, 12, 2, generator=generator) * 60 - 15
    sides = torch.rand(num_images, 12, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + sides], -1)
    count = num_images * 12 * num_classes  # scores without ties, whose order is not promised
    scores = (torch.randperm(count, generator=generator) + 1).reshape(num_images, 12, -1) / (
        count + 1
    )
    found = postprocess(scores.logit(), boxes, (30, 40), 0.3, candidates, 0.4, limit)
    assert len(found) == num_images
    for i, image in enumerate(found):
        arguments = scores[i].tolist(), boxes[i].tolist(), (30, 40), 0.3, candidates, 0.4, limit
        expected = slow_postprocess(*arguments)
        assert image.labels.tolist() == [k for _, _, k in expected]
        values = torch.tensor([s for s, _, _ in expected])
        torch.testing.assert_close(image.scores, values, rtol=1e-4, atol=1e-5)
        rows = torch.tensor([b for _, b, _ in expected]).reshape(-1, 4)
        torch.testing.assert_close(image.boxes, rows)


def test_nothing_above_threshold_gives_empty_detections_of_the_right_shape():
    found = postprocess(torch.full((2, 3, 4), -9.0), torch.zeros(2, 3, 4), (32, 32), **SETTINGS)
    for image in found:
        assert image.boxes.shape == (0, 4)
        assert image.scores.shape == image.labels.shape == (0,)
        assert image.boxes.dtype == image.scores.dtype == torch.float32
        assert image.labels.dtype == torch.int64


def test_box_outside_the_image_is_dropped():
    boxes = torch.tensor([[[40.0, 0, 50, 10], [0, 0, 10, 10]]])
    (found,) = postprocess(torch.full((1, 2, 1), 3.0), boxes, (32, 32), **SETTINGS)
    torch.testing.assert_close(found.boxes, boxes[0, 1:])


def test_score_at_the_threshold_is_not_enough():
    box = torch.tensor([[[0.0, 0, 10, 10]]])
    settings_ = {**SETTINGS, "score_threshold": 0.5}
    (found,) = postprocess(torch.zeros(1, 1, 1), box, (32, 32), **settings_)
    assert len(found.scores) == 0
