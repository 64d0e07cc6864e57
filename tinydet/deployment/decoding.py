"""Raw outputs to boxes clipped to the image, for the checks and the exported graph alike."""

from __future__ import annotations

import torch
from torch import Tensor

from tinydet.yolof.decode import decode_boxes
from tinydet.yolof.detector import Detector


def clipped_boxes(detector: Detector, deltas: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Return (B, A, 4) xyxy boxes in pixels, clipped to an input of (H, W) pixels.

    Clipping before selection changes nothing: candidates are chosen by score alone.
    """
    height, width = image_size
    boxes = decode_boxes(detector.anchors(image_size), deltas, detector.config.center_clamp)
    x1, y1, x2, y2 = boxes.float().unbind(dim=-1)  # (B, A) each
    columns = (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height))
    return torch.stack(columns, dim=-1)
