"""Mosaic: four pictures side by side on one canvas (YOLOv4, arXiv 2004.10934)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tinydet.data.sample import Sample
from tinydet.data.seeding import integer

# Tiles are this much smaller than the picture would be by itself: at a half each shows nearly all
# of its image, and at one objects keep their size but most of the image is cut away.
TILE_SCALE = (0.5, 1.0)
_NEAREST_EDGE = 0.25  # of the canvas, of the point where the tiles meet


class Tile(NamedTuple):
    """A rectangle of a canvas, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_tiles(height: int, width: int, generator: torch.Generator) -> list[Tile]:
    """Draw the point where four tiles meet, and return the tiles of a canvas of height x width."""
    y = integer(generator, *_middle(height))
    x = integer(generator, *_middle(width))
    return [
        Tile(top, left, tall, wide)
        for top, tall in ((0, y), (y, height - y))
        for left, wide in ((0, x), (x, width - x))
    ]


def joined(samples: Sequence[Sample], tiles: Sequence[Tile]) -> Sample:
    """Return one sample of several that fill a canvas's tiles; name and size are the first's."""
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


def _middle(side: int) -> tuple[int, int]:
    """Return the range of the tiles' meeting point along a side; no tile is empty if side >= 2."""
    first = max(1, round(_NEAREST_EDGE * side))
    return min(first, side - first), max(first, side - first)
