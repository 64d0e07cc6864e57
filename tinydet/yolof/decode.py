"""From raw outputs to boxes to detections.

B images, A anchors, K classes, N detections of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

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
    image_size: tuple[int, int],
    score_threshold: float,
    candidates: int,
    nms_iou: float,
    max_detections: int,
) -> list[Detections]:
    """Select detections: threshold, best candidates, clip, drop empty boxes, per-class NMS.

    Args:
        cls_logits: (B, A, K); an (anchor, class) pair is a candidate when its sigmoid is above
            `score_threshold`, so one anchor may give several detections.
        boxes: (B, A, 4) xyxy pixels of the network input.
        image_size: (H, W) of the network input, to which boxes are clipped.
        score_threshold: lowest score, exclusive.
        candidates: pairs of an image that go into NMS, the best over all classes.
        nms_iou: IoU above which the lower-scored box of a class is dropped.
        max_detections: kept for an image.
    """
    num_images, num_anchors, num_classes = cls_logits.shape
    scores = cls_logits.sigmoid().flatten(1)  # (B, A * K)
    top_scores, top_pairs = scores.topk(min(candidates, num_anchors * num_classes), dim=1)
    image_idxs, ranks = (top_scores > score_threshold).nonzero(as_tuple=True)
    pairs = top_pairs[image_idxs, ranks]
    kept_scores = top_scores[image_idxs, ranks]
    labels = pairs % num_classes
    kept_boxes = boxes[image_idxs, pairs // num_classes]
    kept_boxes = clip_boxes_to_image(kept_boxes, image_size)

    solid = (kept_boxes[:, 2:] > kept_boxes[:, :2]).all(dim=1)
    kept_boxes, kept_scores, labels, image_idxs = (
        t[solid] for t in (kept_boxes, kept_scores, labels, image_idxs)
    )
    # One NMS for the whole batch: a class of one image never meets another image's.
    keep = batched_nms(kept_boxes, kept_scores, image_idxs * num_classes + labels, nms_iou)
    # batched_nms sorts by score over all images; a stable sort by image keeps that order in each.
    order = keep[image_idxs[keep].argsort(stable=True)]
    counts = torch.bincount(image_idxs[order], minlength=num_images).tolist()
    return [
        Detections(kept_boxes[i], kept_scores[i], labels[i])
        for i in (part[:max_detections] for part in order.split(counts))
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
        The detections without those that lay in the padding alone.
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
