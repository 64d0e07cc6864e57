"""From raw outputs to boxes to detections.

B images, A anchors, K classes, N detections of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

# A box grows to at most 1000/16 times its anchor's side: exp() of an untrained output stays finite
# (the bound used since Fast R-CNN).
_MAX_LOG_SIZE = math.log(1000 / 16)


@dataclass
class Detections:
    """Detections of one image, best first.

    Attributes:
        boxes: (N, 4) float32 xyxy pixels.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, indices into the detector's classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def decode_boxes(anchors: Tensor, deltas: Tensor, center_clamp: float) -> Tensor:
    """Turn regression outputs into boxes (arXiv 2103.09460, section 4; dx, dy, dw, dh of R-CNN).

    The centre moves by (dx * w, dy * h), at most `center_clamp` pixels either way; the sides are
    multiplied by exp(dw), exp(dh), at most 62.5. Boxes are not clipped to the image.

    Args:
        anchors: (A, 4) xyxy pixels.
        deltas: (..., A, 4).
        center_clamp: pixels.

    Returns:
        (..., A, 4) xyxy pixels, in the dtype of `deltas`.
    """
    sides = anchors[:, 2:] - anchors[:, :2]  # (A, 2)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2  # (A, 2)
    moves = (deltas[..., :2] * sides).clamp(-center_clamp, center_clamp)
    half = sides * deltas[..., 2:].clamp(max=_MAX_LOG_SIZE).exp() / 2
    centers = centers + moves
    return torch.cat([centers - half, centers + half], dim=-1)


def postprocess(
    cls_logits: Tensor,
    boxes: Tensor,
    image_size: tuple[float, float],
    score_threshold: float,
    candidates: int,
    nms_iou: float,
    max_detections: int,
) -> Detections:
    """Select an image's detections: threshold, best candidates, clip, drop empty, per-class NMS.

    One image at a time: in a batch even a sigmoid's last digit depends on where in memory it lies
    (the vectors of a CPU end somewhere). Of equal scores the first in `cls_logits` comes first.

    Args:
        cls_logits: (A, K); an (anchor, class) pair is a candidate when its sigmoid is above
            `score_threshold`, so one anchor may give several detections.
        boxes: (A, 4) xyxy pixels of the network input.
        image_size: (H, W) of the image within the network input, to which boxes are clipped.
        score_threshold: lowest score, exclusive.
        candidates: pairs that go into NMS, the best over all classes.
        nms_iou: IoU above which the lower-scored box of a class is dropped.
        max_detections: kept.
    """
    num_classes = cls_logits.shape[1]
    scores = cls_logits.sigmoid().flatten()  # (A * K,)
    (pairs,) = (scores > score_threshold).nonzero(as_tuple=True)
    scores = scores[pairs]
    if len(pairs) > candidates:
        # Which of equal scores topk takes is not defined: it only says how low to go.
        enough = scores >= scores.topk(candidates).values.min()
        pairs, scores = pairs[enough], scores[enough]
    scores, order = scores.sort(descending=True, stable=True)
    scores, pairs = scores[:candidates], pairs[order[:candidates]]
    labels = pairs % num_classes
    boxes = clip_boxes_to_image(boxes[pairs // num_classes], image_size)
    solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
    # Classes lie side by side and do not meet. float32 would lose the last digits of coordinates to
    # such offsets; float64 keeps them all, but for those within 0.001 pixels of the left border.
    apart = boxes.double()
    apart[:, 0::2] += labels[:, None] * math.ceil(image_size[1])
    keep = nms(apart, scores.double(), nms_iou)[:max_detections]
    return Detections(boxes[keep], scores[keep], labels[keep])


def sizes_in_input(
    images: Tensor,
    sizes: Sequence[tuple[int, int]] | None,
    scales: Sequence[tuple[float, float]] | None,
) -> list[tuple[float, float]]:
    """Return how much of the network input each image takes, without its padding.

    Args:
        images: (B, 3, H, W).
        sizes: (H, W) of each original image; None takes the input for the image.
        scales: (sy, sx) of each image, network pixels an original pixel; None is 1.

    Returns:
        (H, W) of each image in pixels of the network input.
    """
    height, width = images.shape[-2:]
    if sizes is None:
        return [(height, width)] * len(images)
    scales = scales or [(1.0, 1.0)] * len(images)
    return [
        (min(height, h * sy), min(width, w * sx))
        for (h, w), (sy, sx) in zip(sizes, scales, strict=True)
    ]


def place_in_images(
    detections: Sequence[Detections],
    sizes: Sequence[tuple[int, int]] | None,
    scales: Sequence[tuple[float, float]] | None,
) -> list[Detections]:
    """Turn pixels of the network input into pixels of the original images.

    Args:
        detections: of each image.
        sizes: (H, W) of each original image; boxes are clipped to it. None clips nothing.
        scales: (sy, sx) of each image, network pixels an original pixel; boxes are divided by it.

    Returns:
        The detections; without those that lie in the padding alone, if selection left any.
    """
    placed = []
    for i, found in enumerate(detections):
        boxes, solid = found.boxes, slice(None)
        if scales is not None:
            sy, sx = scales[i]
            boxes = boxes / boxes.new_tensor([sx, sy, sx, sy])
        if sizes is not None:
            height, width = sizes[i]
            boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
            solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        placed.append(Detections(boxes[solid], found.scores[solid], found.labels[solid]))
    return placed
