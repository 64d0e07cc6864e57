"""The selection graph against the detector's own post-processing, on made-up scores and boxes."""

import numpy as np
import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime")

from tinydet.config import Model  # noqa: E402
from tinydet.deployment.agreement import compare_detections  # noqa: E402
from tinydet.deployment.onnx_detector import unpack  # noqa: E402
from tinydet.deployment.onnx_selection import selection_graph  # noqa: E402
from tinydet.yolof.decode import postprocess  # noqa: E402


def _run(config, logits, boxes, sizes=None):
    graph = selection_graph(config, logits.shape[-1])
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = {
        "pair_scores": logits.sigmoid().flatten(1).numpy(),
        "anchor_boxes": boxes.numpy(),
    }
    if sizes:
        inputs["sizes"] = np.array(sizes, np.float32)
    outputs = session.run(["boxes", "scores", "labels", "count"], inputs)
    return [torch.from_numpy(x) for x in outputs]


def _expected(config, logits, boxes, sizes=None):
    return [
        postprocess(
            *image,
            config.score_threshold,
            config.candidates,
            config.nms_iou,
            config.max_detections,
        )
        for image in zip(logits, boxes, sizes or [(64, 64)] * len(boxes), strict=True)
    ]


def _random(num_images, num_anchors, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_images, num_anchors, num_classes, generator=generator) - 1
    corners = 64 * torch.rand(num_images, num_anchors, 2, generator=generator)
    sides = 30 * torch.rand(num_images, num_anchors, 2, generator=generator) - 2
    return logits, torch.cat([corners, corners + sides], dim=-1).clamp(0, 64)


@pytest.mark.parametrize(
    ("candidates", "max_detections"),
    [(1000, 100), (40, 100), (1000, 7), (5, 5), (1, 3)],
)
@pytest.mark.parametrize("num_classes", [1, 4])
@pytest.mark.parametrize("num_images", [1, 3])
def test_selection__as_postprocess(candidates, max_detections, num_classes, num_images):
    config = Model(candidates=candidates, max_detections=max_detections)
    logits, boxes = _random(num_images, 150, num_classes, seed=candidates)
    found = unpack(*_run(config, logits, boxes))
    agreement = compare_detections(_expected(config, logits, boxes), found, config)
    assert agreement.unmatched == agreement.ties == 0
    assert agreement.matched >= 1
    assert agreement.max_score < 1e-6
    assert agreement.max_box < 1e-4


@pytest.mark.parametrize("max_detections", [7, 100])
def test_selection__clips_to_the_images_before_any_is_dropped(max_detections):
    config = Model(max_detections=max_detections)
    logits, boxes = _random(3, 150, 4, seed=1)
    sizes = [(64, 64), (20.5, 64), (33, 12)]
    found = unpack(*_run(config, logits, boxes, sizes))
    agreement = compare_detections(_expected(config, logits, boxes, sizes), found, config)
    assert agreement.unmatched == agreement.ties == 0
    assert agreement.matched >= 3 * min(max_detections, 50)
    assert agreement.max_box == 0


def test_selection__equal_scores_in_the_order_of_torch():
    config = Model(candidates=300, nms_iou=1.0)
    logits, boxes = _random(2, 150, 4, seed=2)
    logits = logits.round()
    found = unpack(*_run(config, logits, boxes))
    for a, b in zip(found, _expected(config, logits, boxes), strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.labels, b.labels)


def test_selection__on_a_plain_picture_another_order_is_no_difference_and_another_limit_is():
    config = Model(candidates=400)
    torch.manual_seed(0)
    corners = 4.0 * torch.cartesian_prod(torch.arange(11), torch.arange(11))
    boxes = torch.cat([corners, corners + 20], dim=1)[None].clamp(0, 64)
    logits = [torch.tensor([0.5, -1, -9, 0.5]) + 1e-6 * torch.randn(1, 121, 4) for _ in range(2)]
    raw = [(x.sigmoid(), boxes) for x in logits]
    expected = _expected(config, logits[0], boxes)
    found = unpack(*_run(config, logits[1], boxes))
    agreement = compare_detections(expected, found, config, raw)
    assert agreement.unmatched == 0
    assert agreement.ties > 10
    for broken in (Model(nms_iou=0.3), Model(nms_iou=0.9), Model(max_detections=20)):
        found = unpack(*_run(broken, logits[1], boxes))
        assert not compare_detections(expected, found, config, raw).same, broken


def test_selection__padding():
    config = Model(max_detections=6)
    logits = torch.full((2, 3, 2), -9.0)
    logits[0, 1, 1] = 2.0
    boxes = torch.tensor([[[0, 0, 9, 9], [5, 6, 7, 8], [0, 0, 9, 9]]] * 2, dtype=torch.float32)
    out_boxes, scores, labels, count = _run(config, logits, boxes)
    assert count.tolist() == [1, 0]
    assert labels.tolist() == [[1, -1, -1, -1, -1, -1], [-1] * 6]
    assert out_boxes[0, 0].tolist() == [5, 6, 7, 8]
    assert (out_boxes[0, 1:] == 0).all()
    assert (out_boxes[1] == 0).all()
    assert scores[0, 0].item() == pytest.approx(torch.tensor(2.0).sigmoid().item())
    assert (scores[0, 1:] == 0).all()
    assert labels.dtype == count.dtype == torch.int64


def test_selection__empty_boxes_are_dropped():
    config = Model()
    logits = torch.tensor([[[3.0], [2.0], [1.0]]])
    boxes = torch.tensor([[[5, 5, 5, 9], [5, 9, 9, 9], [1, 1, 4, 4]]], dtype=torch.float32)
    out_boxes, _, _, count = _run(config, logits, boxes)
    assert count.tolist() == [1]
    assert out_boxes[0, 0].tolist() == [1, 1, 4, 4]


def test_selection__overlap_exactly_at_the_limit_stays():
    logits = torch.tensor([[[3.0], [2.0]]])
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 5, 10]]], dtype=torch.float32)  # IoU 0.5
    assert _run(Model(nms_iou=0.5), logits, boxes)[3].tolist() == [2]
    assert _run(Model(nms_iou=0.49), logits, boxes)[3].tolist() == [1]


def test_selection__one_box_two_classes():
    logits = torch.tensor([[[3.0, 2.0]]])
    boxes = torch.tensor([[[0, 0, 10, 10]]], dtype=torch.float32)
    _, _, labels, count = _run(Model(), logits, boxes)
    assert count.tolist() == [2]
    assert labels[0, :3].tolist() == [0, 1, -1]
