"""Random changes of an image's colours."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tinydet.config import Augment
from tinydet.data.seeding import uniform


def recolored(image: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Return a (3, H, W) uint8 RGB image with the colour changes that `augment` asks for."""
    strength = augment.color_jitter
    if strength:
        for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
            image = adjust(image, max(0.0, uniform(generator, 1 - strength, 1 + strength)))
    if augment.hue:
        image = F.adjust_hue(image, uniform(generator, -augment.hue, augment.hue))
    if any(augment.hsv):
        turn, *factors = (uniform(generator, -gain, gain) for gain in augment.hsv)
        image = adjust_hsv(image, turn, 1 + factors[0], 1 + factors[1])
    return image


def adjust_hsv(image: Tensor, turn: float, saturation: float, value: float) -> Tensor:
    """Return the image with its hue turned, and its saturation and value scaled.

    This is the jitter of YOLOv5 and YOLOX: a table of 256 entries for each of H, S and V. It is no
    combination of torchvision's adjustments, whose saturation and brightness are blends with grey
    and black; and one conversion there and back costs half of torchvision's for the hue alone.

    Args:
        image: (3, H, W) uint8 RGB.
        turn: added to the hue, as a fraction of the colour circle.
        saturation: factor, at least 0; the product ends at full saturation.
        value: factor, at least 0; the product ends at 255.
    """
    levels = np.arange(256)
    table = [
        (levels + round(256 * turn)) % 256,
        np.clip(levels * saturation, 0, 255),
        np.clip(levels * value, 0, 255),
    ]
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    picture = picture.convert("HSV").point(np.concatenate(table).round().astype(int).tolist())
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
