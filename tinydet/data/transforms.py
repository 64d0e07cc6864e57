"""Resizing and augmentation of samples.

All random numbers come from the generator that is passed in: torchvision's random transforms draw
from the global one, which would make results depend on the number of loader processes. Boxes are
no tv_tensors, whose dispatch would take longer than all work on the pixels of a small image.

Each image is resized once: size, random scale and multi-scale are one factor. Then it is flipped
and pasted on a canvas of the network's size, or on a mosaic with three others; `random_affine`
transforms the whole canvas, and `mixup` blends it with another one made alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tinydet.config import Augment, Data
from tinydet.data.canvas import flip, paste, random_affine, random_position, resize
from tinydet.data.mixing import TILE_SCALE, draw_tiles, mixup, mosaic
from tinydet.data.sample import Sample
from tinydet.data.seeding import integer, uniform

# Network inputs are whole multiples of this, the stride of the deepest feature map.
STRIDE = 32


def train_transform(data: Data) -> TrainTransform:
    """Return the resizing and augmentation of training images that `data` asks for."""
    return TrainTransform(data.image_size, data.keep_ratio, data.augment, data.short_side)


def plain(augment: Augment) -> Augment:
    """Return the augmentation of the last `plain_epochs`."""
    off = Augment()
    return replace(
        augment,
        mosaic=off.mosaic,
        mixup=off.mixup,
        rotate=off.rotate,
        shear=off.shear,
        translate=off.translate,
        zoom=off.zoom,
        hsv=off.hsv,
    )


def test_transform(data: Data) -> TestTransform:
    """Return the resizing of evaluated images that `data` asks for."""
    return TestTransform(data.image_size, data.keep_ratio, data.short_side)


test_transform.__test__ = False  # type: ignore[attr-defined]  # it is no test


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
        short_side: largest shorter side in pixels if the ratio is kept; 0 is no limit.
    """

    __test__ = False  # it is no test class

    image_size: int
    keep_ratio: bool
    short_side: int = 0

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        """Return the resized sample; `generator` is not used."""
        del generator
        height, width = network_size(sample.size, self.image_size, self.keep_ratio, self.short_side)
        return resize(sample, height, width)


@dataclass(frozen=True)
class TrainTransform:
    """Resizes an image and its boxes, and augments them.

    Attributes:
        image_size: longer side of the result, or both sides, in pixels.
        keep_ratio: keep the aspect ratio; False stretches to a square.
        augment: the random changes.
        short_side: largest shorter side in pixels if the ratio is kept; 0 is no limit.
    """

    image_size: int
    keep_ratio: bool
    augment: Augment
    short_side: int = 0

    def __call__(
        self,
        sample: Sample,
        generator: torch.Generator,
        image_size: int | None = None,
        another: Callable[[], Sample] | None = None,
    ) -> Sample:
        """Return the augmented sample.

        Args:
            sample: an image as it was decoded.
            generator: source of all random numbers.
            image_size: replaces the transform's own, for multi-scale training.
            another: draws one more sample with the same generator; without it there is no mosaic
                and no mixup.
        """
        sides = self._network_size(sample, image_size)
        picture = self._picture(sample, sides, generator, image_size, another)
        if another is not None and _chance(generator, self.augment.mixup):
            other = self._picture(another(), sides, generator, image_size, another)
            picture = mixup(picture, other, generator)
        return picture

    def largest_size(self, size: tuple[int, int], image_size: int) -> tuple[int, int]:
        """Return the largest (height, width) to which an image of `size` is ever resized.

        Args:
            size: (height, width) of the original image.
            image_size: the largest with which the transform is called.
        """
        height, width = network_size(
            size, image_size, self.keep_ratio, self.short_side * image_size / self.image_size
        )
        factor = self.augment.scale[1]
        return max(1, round(height * factor)), max(1, round(width * factor))

    def _network_size(self, sample: Sample, image_size: int | None) -> tuple[int, int]:
        long_side = image_size or self.image_size
        # The size of a batch scales both limits.
        short_side = self.short_side * long_side / self.image_size
        return network_size(sample.size, long_side, self.keep_ratio, short_side)

    def _picture(
        self,
        sample: Sample,
        sides: tuple[int, int],
        generator: torch.Generator,
        image_size: int | None,
        another: Callable[[], Sample] | None,
    ) -> Sample:
        """Return one image or a mosaic on a canvas with these sides (height, width)."""
        # A canvas of a single line of pixels cannot be divided.
        if another is not None and min(sides) > 1 and _chance(generator, self.augment.mosaic):
            tiles = draw_tiles(*sides, generator)
            parts = [
                self._tile(part, (tile.height, tile.width), generator, image_size)
                for part, tile in zip((sample, another(), another(), another()), tiles, strict=True)
            ]
            picture = mosaic(parts, tiles)
        else:
            picture = self._single(sample, sides, generator, image_size)
        return random_affine(picture, self.augment, generator)

    def _single(
        self,
        sample: Sample,
        sides: tuple[int, int],
        generator: torch.Generator,
        image_size: int | None,
    ) -> Sample:
        sample = self._rescaled(sample, generator, image_size)
        top, left = random_position(sample, *sides, generator)
        if uniform(generator, 0.0, 1.0) < self.augment.shift:
            furthest = self.augment.max_shift
            top += integer(generator, -furthest, furthest)
            left += integer(generator, -furthest, furthest)
        return paste(sample, top, left, *sides, self.augment, generator)

    def _tile(
        self,
        sample: Sample,
        sides: tuple[int, int],
        generator: torch.Generator,
        image_size: int | None,
    ) -> Sample:
        sample = self._rescaled(sample, generator, image_size, uniform(generator, *TILE_SCALE))
        top, left = random_position(sample, *sides, generator)
        return paste(sample, top, left, *sides, self.augment, generator)

    def _rescaled(
        self,
        sample: Sample,
        generator: torch.Generator,
        image_size: int | None,
        reduction: float = 1.0,
    ) -> Sample:
        """Return the image resized, with a random factor, and randomly flipped."""
        height, width = self._network_size(sample, image_size)
        # Drawn in log space, so that halving and doubling are equally likely.
        low, high = self.augment.scale
        factor = math.exp(uniform(generator, math.log(low), math.log(high))) * reduction
        sample = resize(sample, max(1, round(height * factor)), max(1, round(width * factor)))
        horizontal = uniform(generator, 0.0, 1.0) < self.augment.hflip
        vertical = uniform(generator, 0.0, 1.0) < self.augment.vflip
        return flip(sample, horizontal, vertical) if horizontal or vertical else sample


def _chance(generator: torch.Generator, probability: float) -> bool:
    """Draw whether something happens; a probability of 0 draws nothing."""
    return probability > 0 and uniform(generator, 0.0, 1.0) < probability
