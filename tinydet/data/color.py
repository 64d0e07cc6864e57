"""Random changes of an image's colours."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tinydet.config import Augment
from tinydet.data.seeding import uniform

_GREY = (0.299, 0.587, 0.114)  # of red, green and blue: the luma of ITU-R BT.601


def recolor(image: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Return a (3, H, W) uint8 RGB image with the colour changes that `augment` asks for."""
    strength = augment.color_jitter
    if strength:
        factors = [max(0.0, uniform(generator, 1 - strength, 1 + strength)) for _ in range(3)]
        image = adjust_color(image, *factors)
    if augment.hue:
        image = F.adjust_hue(image, uniform(generator, -augment.hue, augment.hue))
    if any(augment.hsv):
        hue_shift, *factors = (uniform(generator, -gain, gain) for gain in augment.hsv)
        image = adjust_hsv(image, hue_shift, 1 + factors[0], 1 + factors[1])
    return image


def adjust_color(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Return the image with brightness, contrast and saturation scaled, in this order.

    Equal to torchvision's `adjust_brightness`, `adjust_contrast` and `adjust_saturation` in turn,
    but for rounding and clamping to [0, 255], which happen once at the end instead of after each
    step. It takes a third of their time: the three are one linear function of a pixel and its grey
    value.

    Args:
        image: (3, H, W) uint8 RGB.
        brightness: factor, at least 0.
        contrast: factor of the distance from the mean grey value of the brightened image.
        saturation: factor of the distance from the pixel's own grey value.
    """
    pixels = image.float()
    red, green, blue = pixels
    grey = (_GREY[0] * red).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])  # (H, W)
    # numpy's mean: the last bits of torch's depend on the number of threads.
    offset = brightness * (1 - contrast) * float(grey.numpy().mean())
    same = grey.mul_(brightness * contrast * (1 - saturation)).add_(offset)
    pixels.mul_(brightness * contrast * saturation)
    # One channel at a time: with channels last, broadcasting takes twice the time.
    for channel in pixels:
        channel.add_(same)
    # Via int16: torch's conversion from float32 to uint8 is six times slower.
    return pixels.round_().clamp_(0, 255).short().byte()


def adjust_hsv(image: Tensor, hue_shift: float, saturation: float, value: float) -> Tensor:
    """Return the image with its hue shifted, and its saturation and value scaled.

    This is the jitter of YOLOv5 and YOLOX: a table of 256 entries for each of H, S and V.
    torchvision's adjustments cannot be combined to it: their saturation and brightness are blends
    with grey and black, and their hue alone takes twice the time.

    Args:
        image: (3, H, W) uint8 RGB.
        hue_shift: added to the hue, as a fraction of the colour circle.
        saturation: factor, at least 0; the product ends at full saturation.
        value: factor, at least 0; the product ends at 255.
    """
    levels = np.arange(256)
    table = [
        (levels + round(256 * hue_shift)) % 256,
        np.clip(levels * saturation, 0, 255),
        np.clip(levels * value, 0, 255),
    ]
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    picture = picture.convert("HSV").point(np.concatenate(table).round().astype(int).tolist())
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
