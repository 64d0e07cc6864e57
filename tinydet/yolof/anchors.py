"""Square anchors on a regular grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def make_anchors(
    height: int,
    width: int,
    stride: int,
    sides: Sequence[float],
    device: torch.device | str | None = None,
) -> Tensor:
    """Return every anchor of a (height, width) feature map.

    Centers are at (x * stride, y * stride), without the half-stride offset of some detectors, as in
    the reference YOLOF.

    Args:
        height: rows of the feature map.
        width: columns of the feature map.
        stride: stride of the feature map in pixels of the network input.
        sides: side of each square anchor in pixels.
        device: device of the anchors.

    Returns:
        (height * width * len(sides), 4) float32 xyxy pixels, ordered (y, x, side).
    """
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    centers = torch.stack([x, y], dim=-1).reshape(-1, 1, 2) * float(stride)
    # Filled one by one: for a tensor made from a list of numbers the host would wait for a GPU.
    half = torch.stack([torch.full((1,), side / 2, device=device) for side in sides])  # (S, 1)
    return torch.cat([centers - half, centers + half], dim=-1).reshape(-1, 4)
