"""Draw boxes on an image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tinydet.atomic import replacing
from tinydet.report.fonts import class_names, drawable, font_for

Color = tuple[int, int, int]

# Turning the hue by the golden ratio puts each class far from those before it, however many follow.
_GOLDEN_RATIO = 0.618034


def class_color(label: int) -> Color:
    """Return the class's own RGB colour in 0..255."""
    # Lightness alternates too: neighbouring hues of a long class list still differ.
    lightness = (0.5, 0.65, 0.38)[label % 3]
    red, green, blue = colorsys.hls_to_rgb((label * _GOLDEN_RATIO) % 1.0, lightness, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Tensor | Image.Image,
    boxes: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    scores: Tensor | np.ndarray | None,
    classes: Sequence[str],
) -> Tensor:
    """Return a copy of the image with boxes and class names drawn on it, the surest on top.

    Lines and letters grow with the image, so that a name is as easy to read on a large photograph.

    Args:
        image: (3, H, W) uint8 RGB, or a PIL image.
        boxes: (N, 4) xyxy pixels of `image`.
        labels: (N,) integers, positions in `classes`.
        scores: (N,) in [0, 1], written behind the name; None for ground truth.
        classes: class names in label order; `class_names` says how each is written.

    Returns:
        (3, H, W) uint8 RGB on the CPU.

    Raises:
        ValueError: the image is not uint8 (3, H, W), or the arrays do not fit each other.
    """
    canvas = to_pil(image)
    boxes = torch.as_tensor(boxes).detach().cpu().double().reshape(-1, 4)
    names = [int(label) for label in torch.as_tensor(labels).tolist()]
    values = [None] * len(names) if scores is None else torch.as_tensor(scores).tolist()
    if not len(boxes) == len(names) == len(values):
        raise ValueError(
            f"{len(boxes)} boxes, {len(names)} labels and {len(values)} scores to draw: "
            "give one of each for every box"
        )
    if names and not 0 <= min(names) <= max(names) < len(classes):
        raise ValueError(f"labels {min(names)}..{max(names)} to draw, but {len(classes)} classes")

    draw = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 250))
    letter, written = letter_size(canvas), class_names(tuple(classes))
    order = sorted(range(len(names)), key=lambda i: values[i] or 0.0)
    # All boxes before all names: no line runs through a name.
    for i in order:
        left, top, right, bottom = boxes[i].tolist()
        corners = [left, top, max(left, right - 1), max(top, bottom - 1)]  # PIL includes the last
        draw.rectangle(corners, outline=class_color(names[i]), width=line)
    for i in order:
        score = "" if values[i] is None else f" {values[i]:.2f}"
        text, color = written[names[i]] + score, class_color(names[i])
        draw_name(draw, canvas.size, boxes[i].tolist(), text, color, letter)
    return _to_tensor(canvas)


def write_in_corner(image: Tensor, text: str) -> Tensor:
    """Return a copy of an image (3, H, W) uint8 RGB with a text in its upper left corner."""
    canvas = to_pil(image)
    draw = ImageDraw.Draw(canvas)
    draw_name(draw, canvas.size, [0.0, 0.0, 0.0, 0.0], text, (0, 0, 0), letter_size(canvas))
    return _to_tensor(canvas)


def letter_size(canvas: Image.Image) -> int:
    """Return the size of letters on an image, in pixels."""
    return max(11, round(max(canvas.size) / 42))


def _to_tensor(canvas: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()  # (3, H, W)


def to_pil(image: Tensor | Image.Image) -> Image.Image:
    """Return a copy as a PIL image in RGB.

    Raises:
        ValueError: it is not uint8 (3, H, W).
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")  # a copy if it is RGB already
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"an image to draw on must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}"
        )
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def draw_name(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: list[float],
    text: str,
    color: Color,
    letter: int,
) -> None:
    """Write text, `letter` pixels high, on a patch of colour above the box or inside at its top."""
    pad, text = 2, drawable(text)
    font = font_for(text, letter)
    ascent, descent = font.getmetrics()
    width, height = draw.textlength(text, font=font) + 2 * pad, ascent + descent
    x = min(max(0.0, box[0]), max(0.0, size[0] - width))
    y = box[1] - height if box[1] >= height else max(0.0, box[1])
    y = min(y, max(0.0, size[1] - height))
    draw.rectangle([x, y, x + width - 1, y + height - 1], fill=color)
    # Black on light, white on dark (luma of ITU-R BT.601).
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 128
    draw.text((x + pad, y), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def save_image(image: Tensor, path: str | Path) -> None:
    """Write an image atomically; the file name's ending (.jpg, .png, ...) says the format.

    Args:
        image: (3, H, W) uint8 RGB.
        path: the file; its folder is made.

    Raises:
        ValueError: no image format has this ending.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ValueError(f"{path}: not the name of an image file; end it in .jpg or .png")
    with replacing(path) as temporary:
        to_pil(image).save(temporary, format=kind, **({"quality": 95} if kind == "JPEG" else {}))
