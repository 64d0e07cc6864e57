"""Several images in one: mosaic (YOLOv4, arXiv 2004.10934) and mixup.

Mixup is arXiv 1710.09412, for detection 1902.04103.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tinydet.data.sample import Sample
from tinydet.data.seeding import integer, uniform

# Size of a mosaic's images relative to a single image. At 0.5 each tile shows nearly all of its
# image; at 1 objects keep their size, but most of the image is cut off.
TILE_SCALE = (0.5, 1.0)
_NEAREST_EDGE = 0.25  # smallest distance of the tiles' common corner to an edge, of the canvas
# Near a half: every object stays visible, and can be a full target.
_MIXUP_WEIGHTS = (0.4, 0.6)


class Tile(NamedTuple):
    """A rectangle of a canvas, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_tiles(height: int, width: int, generator: torch.Generator) -> list[Tile]:
    """Draw where four tiles meet, and return the tiles of a canvas of height x width."""
    y = integer(generator, *_middle(height))
    x = integer(generator, *_middle(width))
    return [
        Tile(top, left, tall, wide)
        for top, tall in ((0, y), (y, height - y))
        for left, wide in ((0, x), (x, width - x))
    ]


def mosaic(samples: Sequence[Sample], tiles: Sequence[Tile]) -> Sample:
    """Return one sample made of one for each tile; name and size are those of the first."""
    height = max(tile.top + tile.height for tile in tiles)
    width = max(tile.left + tile.width for tile in tiles)
    image = torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    boxes: list[Tensor] = []
    for sample, (top, left, tall, wide) in zip(samples, tiles, strict=True):
        image[:, top : top + tall, left : left + wide] = sample.image
        boxes.append(sample.boxes + torch.tensor([left, top, left, top], dtype=torch.float32))
    return replace(
        samples[0],
        image=image,
        boxes=torch.cat(boxes),
        labels=torch.cat([sample.labels for sample in samples]),
        difficult=torch.cat([sample.difficult for sample in samples]),
        unreadable=tuple(name for sample in samples for name in sample.unreadable),
    )


def mixup(first: Sample, second: Sample, generator: torch.Generator) -> Sample:
    """Return a blend of two samples of equal shape with the boxes of both.

    Args:
        first: its weight is drawn from [0.4, 0.6); the result has its name and size.
        second: has the remaining weight.
        generator: source of the random weight.
    """
    weight = uniform(generator, *_MIXUP_WEIGHTS)
    image = torch.lerp(second.image.float(), first.image.float(), weight).round_().byte()
    return replace(
        first,
        image=image,
        boxes=torch.cat([first.boxes, second.boxes]),
        labels=torch.cat([first.labels, second.labels]),
        difficult=torch.cat([first.difficult, second.difficult]),
        unreadable=first.unreadable + second.unreadable,
    )


def _middle(side: int) -> tuple[int, int]:
    """Return the range of the tiles' meeting point along a side; no tile is empty if side >= 2."""
    first = max(1, round(_NEAREST_EDGE * side))
    return min(first, side - first), max(first, side - first)
