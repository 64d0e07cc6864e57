"""Geometric changes of an image together with its boxes: resize, flip, paste, random affine.

Pixels are uint8 and stay in the decoder's memory layout (channels last) up to the batch: converting
it would cost more than everything else here. A box that crosses the canvas's edge is clipped, and
dropped if less than `augment.min_visible` of its area or `MIN_SIDE` pixels of a side is left.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from tinydet.config import Augment
from tinydet.data.color import recolor
from tinydet.data.sample import Sample
from tinydet.data.seeding import integer, uniform

# Grey near ImageNet's mean colour (123.7, 116.3, 103.5): close to zero after normalisation.
PAD_VALUE = 114
MIN_SIDE = 1.0


def resize(sample: Sample, height: int, width: int) -> Sample:
    """Return the sample resized to exactly height x width."""
    old_height, old_width = sample.image.shape[-2:]
    if (old_height, old_width) == (height, width):
        return sample
    # A batch of one: torch resizes (1, 3, H, W) in the decoder's pixel order three times as fast
    # as (3, H, W).
    image = F.resize_image(sample.image[None], [height, width], antialias=True)[0]
    # Multiply before dividing, so that boxes at the edge stay exact.
    new, old = [width, height] * 2, [old_width, old_height] * 2
    boxes = sample.boxes * torch.tensor(new) / torch.tensor(old)
    # Relative to the current scale: an image decoded at reduced size already has one.
    scale = (sample.scale[0] * height / old_height, sample.scale[1] * width / old_width)
    return replace(sample, image=image, boxes=boxes, scale=scale)


def flip(sample: Sample, horizontal: bool, vertical: bool) -> Sample:
    """Return the sample flipped horizontally, vertically or both."""
    height, width = sample.image.shape[-2:]
    x1, y1, x2, y2 = sample.boxes.unbind(1)
    if horizontal:
        x1, x2 = width - x2, width - x1
    if vertical:
        y1, y2 = height - y2, height - y1
    axes = [-1] * horizontal + [-2] * vertical
    return replace(sample, image=sample.image.flip(axes), boxes=torch.stack([x1, y1, x2, y2], 1))


def random_position(
    sample: Sample, height: int, width: int, generator: torch.Generator
) -> tuple[int, int]:
    """Draw the (top, left) at which to paste the image on a canvas of height x width.

    A smaller image stays inside the canvas; a larger one covers it.
    """
    free_y, free_x = height - sample.image.shape[-2], width - sample.image.shape[-1]
    top = integer(generator, min(0, free_y), max(0, free_y))
    left = integer(generator, min(0, free_x), max(0, free_x))
    return top, left


def paste(
    sample: Sample,
    top: int,
    left: int,
    height: int,
    width: int,
    augment: Augment,
    generator: torch.Generator,
) -> Sample:
    """Return a grey canvas of height x width with the recoloured image pasted at (top, left).

    What reaches over the edge is cut off, and boxes of which too little is left are dropped.
    """
    image_height, image_width = sample.image.shape[-2:]
    # A line of a narrow image stays visible, however far it is shifted.
    top = min(max(top, 1 - image_height), height - 1)
    left = min(max(left, 1 - image_width), width - 1)
    y1, x1 = max(0, -top), max(0, -left)
    y2, x2 = min(image_height, height - top), min(image_width, width - left)
    # Colours change after the crop, where there are fewest pixels, and before the padding, which
    # stays grey.
    image = recolor(sample.image[:, y1:y2, x1:x2], augment, generator)
    whole = sample.boxes + torch.tensor([left, top, left, top])
    y1, x1, y2, x2 = y1 + top, x1 + left, y2 + top, x2 + left  # on the canvas from here on
    if (y2 - y1, x2 - x1) != (height, width):
        canvas = torch.full((height, width, 3), PAD_VALUE, dtype=torch.uint8).permute(2, 0, 1)
        canvas[:, y1:y2, x1:x2] = image
        image = canvas
    edges = torch.tensor([[x1, y1, x1, y1], [x2, y2, x2, y2]], dtype=whole.dtype)
    return keep_visible(
        replace(sample, image=image), whole.clamp(*edges), whole, augment.min_visible
    )


def random_affine(sample: Sample, augment: Augment, generator: torch.Generator) -> Sample:
    """Return the sample rotated, scaled, translated and sheared at random, on a canvas of its size.

    A box becomes the axis-aligned box around its four transformed corners. After a rotation that is
    larger than the object needs, so large angles cost localization accuracy. Pixels from outside
    the picture are grey.
    """
    if not (augment.rotate or augment.shear or augment.translate or augment.zoom != (1.0, 1.0)):
        return sample
    height, width = sample.image.shape[-2:]
    low, high = augment.zoom
    affine: dict[str, Any] = {
        "angle": uniform(generator, -augment.rotate, augment.rotate),
        "translate": [
            side * uniform(generator, -augment.translate, augment.translate)
            for side in (width, height)
        ],
        # In log space, so that halving and doubling are equally likely.
        "scale": math.exp(uniform(generator, math.log(low), math.log(high))),
        "shear": [uniform(generator, -augment.shear, augment.shear) for _ in range(2)],
    }
    # Shifted so that grey is zero, which the edge blends with: `fill` would leave a dark line.
    offset = F.affine(
        sample.image.float() - PAD_VALUE, **affine, interpolation=InterpolationMode.BILINEAR
    )
    image = offset.add_(PAD_VALUE).round_().byte()
    # Not clamped here, to find out how much of each box is left.
    boxes = BoundingBoxes(
        sample.boxes,
        format=BoundingBoxFormat.XYXY,
        canvas_size=(height, width),
        clamping_mode=None,
    )
    whole = F.affine(boxes, **affine).as_subclass(Tensor)
    edges = torch.tensor([width, height, width, height], dtype=whole.dtype)
    clipped = whole.clamp(min=torch.zeros(4, dtype=whole.dtype), max=edges)
    return keep_visible(replace(sample, image=image), clipped, whole, augment.min_visible)


def keep_visible(sample: Sample, boxes: Tensor, whole: Tensor, min_visible: float) -> Sample:
    """Return the sample with clipped boxes, without those of which too little is left.

    Args:
        sample: with labels and difficult flags of all boxes; its own boxes are not used.
        boxes: (N, 4) xyxy, clipped to the canvas.
        whole: (N, 4) xyxy, the same boxes before clipping.
        min_visible: smallest fraction of a box's area that has to be left.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    whole_sides = whole[:, 2:] - whole[:, :2]
    visible = sides.prod(1) / whole_sides.prod(1).clamp(min=1e-6)
    kept = (visible >= min_visible) & (sides.amin(1) >= MIN_SIDE)
    return replace(
        sample, boxes=boxes[kept], labels=sample.labels[kept], difficult=sample.difficult[kept]
    )
