"""Scores and boxes of all anchors, before any are selected.

B images, A anchors, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinydet.yolof.decode import decode_boxes
from tinydet.yolof.detector import Detector

# Largest differences allowed in float32: of any score, and of the box coordinates, in pixels and
# clipped to the image, of the best-scored anchors of an image. In an untrained YOLOv5 rounding is
# a hundredth of a pixel: that much is float32 off float64 in torch itself.
MAX_SCORE = 1e-4
MAX_BOX = 0.05
_BEST_ANCHORS = 100


def scores_and_boxes(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores (B, A, K) in 0..1 and boxes (B, A, 4) xyxy pixels, clipped to the image.

    Clipping before selection changes nothing: candidates are chosen by score alone.

    Args:
        detector: in eval mode.
        images: (B, 3, H, W) RGB in 0..255.
    """
    cls_logits, deltas = detector(images)
    height, width = image_size = (images.shape[-2], images.shape[-1])
    boxes = decode_boxes(detector.anchors(image_size), deltas, detector.config.center_clamp)
    x1, y1, x2, y2 = boxes.float().unbind(dim=-1)  # (B, A) each
    columns = (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height))
    return cls_logits.float().sigmoid(), torch.stack(columns, dim=-1)


def largest_differences(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Compare what two forms of a detector return for the same images.

    Args:
        a: scores and boxes of one form, the reference.
        b: scores and boxes of the other.

    Returns:
        The largest difference of a score, and of a box coordinate of the reference's best anchors
        in pixels; infinite where a value is not a number.
    """
    best = a[0].amax(dim=-1)  # (B, A)
    best = best.topk(min(_BEST_ANCHORS, best.shape[1]), dim=1).indices  # (B, 100)
    rows = torch.arange(len(best))[:, None]
    worst = [(a[0] - b[0]).abs().max(), (a[1] - b[1])[rows, best].abs().max()]
    # NaN would be lost in comparisons and in max().
    score, box = (torch.nan_to_num(x, nan=torch.inf).item() for x in worst)
    return score, box
