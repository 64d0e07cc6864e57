"""Images and their boxes together: resized, flipped, and put on a canvas of a given size.

Geometry works on uint8 with anti-aliasing. Pixels stay in the decoder's order to the end, channels
last in memory, as in a batch: changing it would cost more than all else. A box that is cut at the
canvas's edge is clipped, and dropped when less than `MIN_VISIBLE` of its area or less than
`MIN_SIDE` pixels of a side is left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tinydet.config import Augment
from tinydet.data.color import recolored
from tinydet.data.sample import Sample
from tinydet.data.seeding import integer

# Grey near ImageNet's mean colour (123.7, 116.3, 103.5): close to zero after normalisation.
PAD_VALUE = 114
MIN_VISIBLE = 0.2
MIN_SIDE = 1.0


def resized(sample: Sample, height: int, width: int) -> Sample:
    """Return the sample resized to exactly height x width."""
    old_height, old_width = sample.image.shape[-2:]
    if (old_height, old_width) == (height, width):
        return sample
    # A batch of one: torch resizes (1, 3, H, W) in the decoder's pixel order three times as fast
    # as (3, H, W).
    image = F.resize_image(sample.image[None], [height, width], antialias=True)[0]
    # First times, then by: what lies on the edge stays there to the last bit.
    new, old = [width, height] * 2, [old_width, old_height] * 2
    boxes = sample.boxes * torch.tensor(new) / torch.tensor(old)
    # Of what was there: an image that was decoded at reduced scale has a scale already.
    scale = (sample.scale[0] * height / old_height, sample.scale[1] * width / old_width)
    return replace(sample, image=image, boxes=boxes, scale=scale)


def flipped(sample: Sample, horizontal: bool, vertical: bool) -> Sample:
    """Return the sample with left and right exchanged, or top and bottom, or both."""
    height, width = sample.image.shape[-2:]
    x1, y1, x2, y2 = sample.boxes.unbind(1)
    if horizontal:
        x1, x2 = width - x2, width - x1
    if vertical:
        y1, y2 = height - y2, height - y1
    axes = [-1] * horizontal + [-2] * vertical
    return replace(sample, image=sample.image.flip(axes), boxes=torch.stack([x1, y1, x2, y2], 1))


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
    # Colours change after the crop, where there are fewest pixels, and before the padding, which
    # stays grey.
    image = recolored(sample.image[:, y1:y2, x1:x2], augment, generator)
    whole = sample.boxes + torch.tensor([left, top, left, top])
    y1, x1, y2, x2 = y1 + top, x1 + left, y2 + top, x2 + left  # on the canvas from here on
    if (y2 - y1, x2 - x1) != (height, width):
        canvas = torch.full((height, width, 3), PAD_VALUE, dtype=torch.uint8).permute(2, 0, 1)
        canvas[:, y1:y2, x1:x2] = image
        image = canvas
    edges = torch.tensor([[x1, y1, x1, y1], [x2, y2, x2, y2]], dtype=whole.dtype)
    return keep_visible(replace(sample, image=image), whole.clamp(*edges), whole)


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
