"""Random rotation, scale, translation and shear of a whole picture."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from tinydet.config import Augment
from tinydet.data.canvas import PAD_VALUE, keep_visible
from tinydet.data.sample import Sample
from tinydet.data.seeding import uniform


def is_on(augment: Augment) -> bool:
    """Whether pictures are warped at all."""
    asked = augment.rotate or augment.shear or augment.translate
    return bool(asked) or augment.zoom != (1.0, 1.0)


def warped(sample: Sample, augment: Augment, generator: torch.Generator) -> Sample:
    """Return the sample rotated, scaled, moved and sheared at random, on a canvas of its own size.

    A box becomes the upright box around its four turned corners: after a rotation it is larger than
    its object needs, which is why large angles cost accuracy of position. What comes in from beyond
    the picture's edge is grey.
    """
    if not is_on(augment):
        return sample
    height, width = sample.image.shape[-2:]
    low, high = augment.zoom
    warp = {
        "angle": uniform(generator, -augment.rotate, augment.rotate),
        "translate": [
            side * uniform(generator, -augment.translate, augment.translate)
            for side in (width, height)
        ],
        # In log space, so that halving and doubling are equally likely.
        "scale": math.exp(uniform(generator, math.log(low), math.log(high))),
        "shear": [uniform(generator, -augment.shear, augment.shear) for _ in range(2)],
    }
    # Zero outside, so that the edge blends with grey: torchvision's own `fill` leaves a dark line.
    offset = F.affine(
        sample.image.float() - PAD_VALUE, **warp, interpolation=InterpolationMode.BILINEAR
    )
    image = offset.add_(PAD_VALUE).round_().byte()
    # Not clamped, so that it is known how much of each box is left.
    boxes = BoundingBoxes(
        sample.boxes,
        format=BoundingBoxFormat.XYXY,
        canvas_size=(height, width),
        clamping_mode=None,
    )
    whole = F.affine(boxes, **warp).as_subclass(Tensor)
    edges = torch.tensor([width, height, width, height], dtype=whole.dtype)
    clipped = whole.clamp(min=torch.zeros(4, dtype=whole.dtype), max=edges)
    return keep_visible(replace(sample, image=image), clipped, whole)
