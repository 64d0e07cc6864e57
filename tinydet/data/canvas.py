"""Images and their boxes together: resized, flipped, and put on a canvas of a given size.

Geometry works on uint8 with anti-aliasing. A box that is cut at the canvas's edge is clipped, and
dropped when less than `MIN_VISIBLE` of its area or less than `MIN_SIDE` pixels of a side is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from tinydet.config import Augment
from tinydet.data.color import recolored
from tinydet.data.sample import Sample
from tinydet.data.seeding import integer

# Grey near ImageNet's mean colour (123.7, 116.3, 103.5): close to zero after normalisation.
PAD_VALUE = 114
MIN_VISIBLE = 0.2
MIN_SIDE = 1.0


def as_boxes(boxes: Tensor, canvas_size: tuple[int, int]) -> BoundingBoxes:
    """Return (N, 4) xyxy boxes as torchvision's, on a canvas of (height, width)."""
    return BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=tuple(canvas_size))


def resized(sample: Sample, height: int, width: int) -> Sample:
    """Return the sample resized to exactly height x width."""
    old_height, old_width = sample.image.shape[-2:]
    if (old_height, old_width) == (height, width):
        return sample
    # A batch of one: torch resizes (1, 3, H, W) in the decoder's pixel order three times as fast
    # as (3, H, W).
    image = F.resize(sample.image[None], [height, width], antialias=True)[0]
    boxes = F.resize(as_boxes(sample.boxes, (old_height, old_width)), [height, width])
    # Of what was there: an image that was decoded at reduced scale has a scale already.
    scale = (sample.scale[0] * height / old_height, sample.scale[1] * width / old_width)
    return replace(sample, image=image, boxes=boxes.as_subclass(Tensor), scale=scale)


def flipped(sample: Sample, flip: Callable[[Tensor], Tensor]) -> Sample:
    """Return the sample after torchvision's horizontal_flip or vertical_flip."""
    boxes = flip(as_boxes(sample.boxes, sample.image.shape[-2:]))
    return replace(sample, image=flip(sample.image), boxes=boxes.as_subclass(Tensor))


def placement(
    sample: Sample, height: int, width: int, generator: torch.Generator
) -> tuple[int, int]:
    """Draw where the image's upper left corner goes on a canvas of height x width.

    A smaller image stays inside the canvas; a larger one covers it.
    """
    free_y, free_x = height - sample.image.shape[-2], width - sample.image.shape[-1]
    top = integer(generator, min(0, free_y), max(0, free_y))
    left = integer(generator, min(0, free_x), max(0, free_x))
    return top, left


def placed(
    sample: Sample,
    top: int,
    left: int,
    height: int,
    width: int,
    augment: Augment,
    generator: torch.Generator,
) -> Sample:
    """Return what a canvas of height x width shows of an image placed at (top, left), recoloured.

    The rest of the canvas is grey, and boxes of which little is left are dropped.
    """
    image_height, image_width = sample.image.shape[-2:]
    # However far a narrow image is shifted, a line of it stays visible.
    top = min(max(top, 1 - image_height), height - 1)
    left = min(max(left, 1 - image_width), width - 1)
    y1, x1 = max(0, -top), max(0, -left)
    y2, x2 = min(image_height, height - top), min(image_width, width - left)
    window = [y1, x1, y2 - y1, x2 - x1]  # of the image, seen on the canvas
    borders = [max(0, left), max(0, top)]  # left, top
    borders += [width - borders[0] - window[3], height - borders[1] - window[2]]  # right, bottom

    # Colours change after the crop, where there are fewest pixels, and before the padding, which
    # stays grey. From here on plane by plane, which is faster than the decoder's pixel order.
    image = recolored(F.crop(sample.image, *window).contiguous(), augment, generator)
    boxes = F.crop(as_boxes(sample.boxes, (image_height, image_width)), *window)
    if any(borders):
        image = F.pad(image, borders, fill=PAD_VALUE)
        boxes = F.pad(boxes, borders)
    return keep_visible(replace(sample, image=image), boxes.as_subclass(Tensor), sample.boxes)


def keep_visible(sample: Sample, boxes: Tensor, whole: Tensor) -> Sample:
    """Return the sample with its boxes clipped, those dropped of which too little is left.

    Args:
        sample: its boxes do not matter; labels and difficult flags are one for each of them.
        boxes: (N, 4) xyxy, clipped to the canvas.
        whole: (N, 4) xyxy, the same boxes before they were clipped.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    whole_sides = whole[:, 2:] - whole[:, :2]
    visible = sides.prod(1) / whole_sides.prod(1).clamp(min=1e-6)
    kept = (visible >= MIN_VISIBLE) & (sides.amin(1) >= MIN_SIDE)
    return replace(
        sample, boxes=boxes[kept], labels=sample.labels[kept], difficult=sample.difficult[kept]
    )
