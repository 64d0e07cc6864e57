"""Decodes raw outputs into boxes and detections.

B images, A anchors, K classes, N detections of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

# Limits a box to 1000 / 16 times its anchor's side, so that exp() of untrained outputs stays finite
# (the limit used since Fast R-CNN).
_MAX_LOG_SIZE = math.log(1000 / 16)


@dataclass
class Detections:
    """Detections of one image, by descending score.

    Attributes:
        boxes: (N, 4) float32 xyxy pixels.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, indices into the detector's classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def decode_boxes(anchors: Tensor, deltas: Tensor, center_clamp: float) -> Tensor:
    """Decode regression outputs into boxes (arXiv 2103.09460, section 4; R-CNN's dx, dy, dw, dh).

    The center moves by (dx * w, dy * h), limited to `center_clamp` pixels in each direction; the
    sides are multiplied by exp(dw) and exp(dh), at most 62.5. Boxes are not clipped to the image.

    Args:
        anchors: (A, 4) xyxy pixels.
        deltas: (..., A, 4).
        center_clamp: largest move of the center in pixels.

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
    pre_nms_topk: int,
    nms_iou: float,
    max_detections: int,
) -> Detections:
    """Select an image's detections: threshold, top k, clip, drop empty boxes, per-class NMS.

    Images are processed one at a time so that results do not depend on the batch: the last bit of a
    sigmoid can depend on its position in a vectorized loop. Equal scores keep the order of
    `cls_logits`.

    Args:
        cls_logits: (A, K); each (anchor, class) pair is a candidate, so one anchor may yield
            several detections.
        boxes: (A, 4) xyxy pixels of the network input.
        image_size: (H, W) of the image within the network input, to which boxes are clipped.
        score_threshold: lowest score (sigmoid of the logit), exclusive.
        pre_nms_topk: maximum number of candidates passed to NMS, over all classes.
        nms_iou: IoU above which the lower-scoring box of a class is suppressed.
        max_detections: maximum number of detections.
    """
    num_classes = cls_logits.shape[1]
    scores = cls_logits.sigmoid().flatten()  # (A * K,)
    (pairs,) = (scores > score_threshold).nonzero(as_tuple=True)
    scores = scores[pairs]
    if len(pairs) > pre_nms_topk:
        # The choice of topk among equal scores is undefined, so it only gives the threshold.
        enough = scores >= scores.topk(pre_nms_topk).values.min()
        pairs, scores = pairs[enough], scores[enough]
    scores, order = scores.sort(descending=True, stable=True)
    scores, pairs = scores[:pre_nms_topk], pairs[order[:pre_nms_topk]]
    labels = pairs % num_classes
    boxes = clip_boxes_to_image(boxes[pairs // num_classes], image_size)
    solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
    # Boxes are offset by class so that classes do not overlap. With such offsets float32 would lose
    # digits of the coordinates; float64 is exact except within 0.001 pixels of the left border.
    # Apple's GPUs have no float64.
    on_mps = boxes.device.type == "mps"
    boxes, scores, labels = (x.cpu() if on_mps else x for x in (boxes, scores, labels))
    shifted = boxes.double()
    shifted[:, 0::2] += labels[:, None] * math.ceil(image_size[1])
    keep = nms(shifted, scores.double(), nms_iou)[:max_detections]
    return Detections(boxes[keep], scores[keep], labels[keep])


def sizes_in_input(
    images: Tensor,
    sizes: Sequence[tuple[int, int]] | None,
    scales: Sequence[tuple[float, float]] | None,
) -> list[tuple[float, float]]:
    """Return the size of each image within the network input, without padding.

    Args:
        images: (B, 3, H, W).
        sizes: (H, W) of each original image; None for the size of the input.
        scales: (sy, sx) of each image, network pixels per original pixel; None for 1.

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
    """Convert boxes from pixels of the network input to pixels of the original images.

    Args:
        detections: the detections of each image.
        sizes: (H, W) of each original image; boxes are clipped to it. None for no clipping.
        scales: (sy, sx) of each image, network pixels per original pixel; boxes are divided by it.

    Returns:
        The detections, without any that lie entirely in the padding.
    """
    placed = []
    for i, found in enumerate(detections):
        boxes, scores, labels = found.boxes, found.scores, found.labels
        if scales is not None:
            sy, sx = scales[i]
            boxes = boxes / boxes.new_tensor([sx, sy, sx, sy])
        if sizes is not None:
            height, width = sizes[i]
            boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
            solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
        placed.append(Detections(boxes, scores, labels))
    return placed
