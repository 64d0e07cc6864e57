"""Resizing and augmentation of samples, with torchvision.transforms.v2 on tv_tensors.

All numbers come from the generator that is passed in: torchvision's random transform classes draw
from the global one, which would make results depend on the number of loader processes. So its
functional half is used.

Geometry works on uint8 with anti-aliasing, and each image is resized once: size, random scale and
multi-scale are one factor. A box that is cut at the image's edge is clipped, and dropped when less
than `MIN_VISIBLE` of its area or less than `MIN_SIDE` pixels of a side is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from tinydet.config import Augment, Data
from tinydet.data.sample import Sample
from tinydet.data.seeding import integer, uniform

# Grey near ImageNet's mean colour (123.7, 116.3, 103.5): close to zero after normalisation.
PAD_VALUE = 114
MIN_VISIBLE = 0.2
MIN_SIDE = 1.0
# Network inputs are whole multiples of this, the stride of the deepest feature map.
STRIDE = 32


def train_transform(data: Data) -> TrainTransform:
    """Return the resizing and augmentation of training images that `data` asks for."""
    return TrainTransform(data.image_size, data.keep_ratio, data.augment, data.short_side)


def test_transform(data: Data) -> TestTransform:
    """Return the resizing of evaluated images that `data` asks for; it draws nothing."""
    return TestTransform(data.image_size, data.keep_ratio, data.short_side)


test_transform.__test__ = False  # pytest would take it for a test


def network_size(
    size: tuple[int, int], image_size: int, keep_ratio: bool, short_side: float = 0
) -> tuple[int, int]:
    """Return the (height, width) to which an image of `size` (height, width) is resized."""
    if not keep_ratio:
        return image_size, image_size
    factor = image_size / max(size)
    if short_side:
        factor = min(factor, short_side / min(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) rounded up to whole strides."""
    return math.ceil(size[0] / STRIDE) * STRIDE, math.ceil(size[1] / STRIDE) * STRIDE


@dataclass(frozen=True)
class TestTransform:
    """Resizes an image and its boxes.

    Attributes:
        image_size: longer side of the result, or both sides, in pixels.
        keep_ratio: keep the aspect ratio; False stretches to a square.
        short_side: bound of the shorter side in pixels where the ratio is kept; 0 is none.
    """

    __test__ = False  # pytest would take it for a test class

    image_size: int
    keep_ratio: bool
    short_side: int = 0

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        """Return the resized sample; `generator` is not used."""
        del generator
        height, width = network_size(sample.size, self.image_size, self.keep_ratio, self.short_side)
        return _resized(sample, height, width)


@dataclass(frozen=True)
class TrainTransform:
    """Resizes an image and its boxes, and augments them.

    Attributes:
        image_size: longer side of the result, or both sides, in pixels.
        keep_ratio: keep the aspect ratio; False stretches to a square.
        augment: the random changes.
        short_side: bound of the shorter side in pixels where the ratio is kept; 0 is none.
    """

    image_size: int
    keep_ratio: bool
    augment: Augment
    short_side: int = 0

    def __call__(
        self, sample: Sample, generator: torch.Generator, image_size: int | None = None
    ) -> Sample:
        """Return the augmented sample.

        Args:
            sample: an image in its original size.
            generator: every random number is drawn from it.
            image_size: stands in for the transform's own, for multi-scale training.
        """
        augment, draw = self.augment, generator
        long_side = image_size or self.image_size
        # A batch's own size scales both bounds.
        short_side = self.short_side * long_side / self.image_size
        height, width = network_size(sample.size, long_side, self.keep_ratio, short_side)
        # Drawn in log space, so that halving and doubling are equally likely.
        low, high = augment.scale
        factor = math.exp(uniform(draw, math.log(low), math.log(high)))
        sample = _resized(sample, max(1, round(height * factor)), max(1, round(width * factor)))
        if _flips(draw, augment.hflip):
            sample = _flipped(sample, F.horizontal_flip)
        if _flips(draw, augment.vflip):
            sample = _flipped(sample, F.vertical_flip)
        top, left = _placement(sample, height, width, draw)
        if _flips(draw, augment.shift):
            top += integer(draw, -augment.max_shift, augment.max_shift)
            left += integer(draw, -augment.max_shift, augment.max_shift)
        image, boxes, kept = _place(sample, top, left, height, width, augment, draw)
        return replace(
            sample,
            image=image,
            boxes=boxes[kept],
            labels=sample.labels[kept],
            difficult=sample.difficult[kept],
        )


def _flips(generator: torch.Generator, probability: float) -> bool:
    return uniform(generator, 0.0, 1.0) < probability


def _resized(sample: Sample, height: int, width: int) -> Sample:
    """Return the sample resized to exactly height x width."""
    old_height, old_width = sample.image.shape[-2:]
    boxes = _as_boxes(sample.boxes, (old_height, old_width))
    image = sample.image
    if (old_height, old_width) != (height, width):
        # A batch of one: torch resizes (1, 3, H, W) in the decoder's pixel order three times as
        # fast as (3, H, W).
        image = F.resize(image[None], [height, width], antialias=True)[0]
        boxes = F.resize(boxes, [height, width])
    scale = (height / sample.size[0], width / sample.size[1])
    return replace(sample, image=image, boxes=boxes.as_subclass(Tensor), scale=scale)


def _flipped(sample: Sample, flip: Callable[[Tensor], Tensor]) -> Sample:
    boxes = flip(_as_boxes(sample.boxes, sample.image.shape[-2:]))
    return replace(sample, image=flip(sample.image), boxes=boxes.as_subclass(Tensor))


def _placement(
    sample: Sample, height: int, width: int, generator: torch.Generator
) -> tuple[int, int]:
    """Draw where the image's upper left corner goes on a canvas of height x width.

    A smaller image stays inside the canvas; a larger one covers it.
    """
    free_y, free_x = height - sample.image.shape[-2], width - sample.image.shape[-1]
    top = integer(generator, min(0, free_y), max(0, free_y))
    left = integer(generator, min(0, free_x), max(0, free_x))
    return top, left


def _place(
    sample: Sample,
    top: int,
    left: int,
    height: int,
    width: int,
    augment: Augment,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut out and pad what a canvas of height x width shows of an image placed at (top, left).

    Returns:
        The canvas (3, height, width) uint8, the clipped boxes (N, 4) and which to keep, (N,) bool.
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
    # stays grey.
    image = _recolored(F.crop(sample.image, *window), augment, generator)
    boxes = F.crop(_as_boxes(sample.boxes, (image_height, image_width)), *window)
    if any(borders):
        image = F.pad(image[None], borders, fill=PAD_VALUE)[0]
        boxes = F.pad(boxes, borders)
    boxes = boxes.as_subclass(Tensor)
    sides = boxes[:, 2:] - boxes[:, :2]
    full_sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
    visible = sides.prod(1) / full_sides.prod(1).clamp(min=1e-6)
    return image, boxes, (visible >= MIN_VISIBLE) & (sides.amin(1) >= MIN_SIDE)


def _recolored(image: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    strength = augment.color_jitter
    if strength:
        for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
            image = adjust(image, max(0.0, uniform(generator, 1 - strength, 1 + strength)))
    if augment.hue:
        image = F.adjust_hue(image, uniform(generator, -augment.hue, augment.hue))
    return image


def _as_boxes(boxes: Tensor, canvas_size: tuple[int, int]) -> BoundingBoxes:
    return BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=tuple(canvas_size))
