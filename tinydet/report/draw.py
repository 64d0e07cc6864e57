"""Draw boxes on an image: detections in class colors, or what a detector got wrong."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from tinydet.atomic import replacing
from tinydet.report.fonts import class_names, drawable, font_for

Color = tuple[int, int, int]

# Blue and orange of Okabe and Ito: color-blind readers can tell them apart, and both are bright
# on photographs.
TRUTH_COLOR: Color = (86, 180, 233)
DETECTION_COLOR: Color = (230, 159, 0)

# Turning the hue by the golden ratio puts each class far from those before it, however many follow.
_GOLDEN_RATIO = 0.618034
_LONGEST_NAME = 24  # characters
_MOST_NAMES = 8  # of each kind; more would hide the image


def class_color(label: int) -> Color:
    """Return the RGB color of a class, in 0..255."""
    # Lightness alternates too: neighboring hues of a long class list still differ.
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
    """Return a copy of the image with boxes and class names, the highest scores on top.

    Line widths and font sizes scale with the image.

    Args:
        image: (3, H, W) uint8 RGB, or a PIL image.
        boxes: (N, 4) xyxy pixels of `image`.
        labels: (N,) integers, indices into `classes`.
        scores: (N,) in [0, 1], written after the name; None for ground truth.
        classes: class names in label order; see `class_names` for how they are written.

    Returns:
        (3, H, W) uint8 RGB on the CPU.

    Raises:
        ValueError: the image is not uint8 (3, H, W), or the arrays do not match each other.
    """
    canvas = _to_pil(image)
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
    line, written = max(2, round(max(canvas.size) / 250)), class_names(tuple(classes))
    order = sorted(range(len(names)), key=lambda i: values[i] or 0.0)
    # All boxes before all names: no line runs through a name.
    for i in order:
        draw.rectangle(_corners(boxes[i].tolist()), outline=class_color(names[i]), width=line)
    for i in order:
        score = "" if values[i] is None else f" {values[i]:.2f}"
        _draw_name(canvas, boxes[i].tolist(), written[names[i]] + score, class_color(names[i]))
    return _to_tensor(canvas)


def draw_errors(
    image: Tensor | Image.Image,
    truth: np.ndarray,
    truth_names: Sequence[str],
    missed: np.ndarray,
    found: np.ndarray,
    found_names: Sequence[str],
    wrong: np.ndarray,
) -> Tensor:
    """Return a copy of the image with ground truth dashed and detections solid, errors thick.

    Args:
        image: (3, H, W) uint8 RGB, or a PIL image.
        truth: (M, 4) xyxy pixels of ground-truth boxes.
        truth_names: a name for each; those of the first few missed boxes are written.
        missed: (M,) bool.
        found: (N, 4) xyxy pixels of detections, by descending score.
        found_names: a name for each; those of the first few wrong detections are written.
        wrong: (N,) bool.

    Returns:
        (3, H, W) uint8 RGB on the CPU.
    """
    canvas = _to_pil(image)
    draw, longest = ImageDraw.Draw(canvas), max(canvas.size)
    thin, thick = max(1, round(longest / 400)), max(2, round(longest / 160))
    # Correct boxes below wrong ones, and all names above all boxes.
    for is_error in (False, True):
        width = thick if is_error else thin
        for box in np.asarray(found)[np.asarray(wrong, bool) == is_error]:
            draw.rectangle(_corners(box.tolist()), outline=DETECTION_COLOR, width=width)
        for box in np.asarray(truth)[np.asarray(missed, bool) == is_error]:
            _draw_dashed(draw, box.tolist(), TRUTH_COLOR, width, dash=max(4, longest // 70))
    for boxes, names, marked, color in (
        (found, found_names, wrong, DETECTION_COLOR),
        (truth, truth_names, missed, TRUTH_COLOR),
    ):
        # The last are drawn on top.
        for i in np.flatnonzero(marked)[:_MOST_NAMES][::-1]:
            name = drawable(names[i])
            short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
            _draw_name(canvas, list(boxes[i]), short, color)
    return _to_tensor(canvas)


def write_in_corner(image: Tensor, text: str) -> Tensor:
    """Return a copy of an image, (3, H, W) uint8 RGB, with a text in its upper left corner."""
    canvas = _to_pil(image)
    _draw_name(canvas, [0.0, 0.0, 0.0, 0.0], text, (0, 0, 0))
    return _to_tensor(canvas)


def side_by_side(pictures: Sequence[Tensor], captions: Sequence[str], below: str) -> Tensor:
    """Return pictures of the same image in a row, each under its caption.

    Args:
        pictures: (3, H, W) uint8 RGB, all of one size.
        captions: a line for each; what does not fit is cut off.
        below: a line below them.

    Returns:
        (3, H', W') uint8 RGB.
    """
    panels = [_to_pil(picture) for picture in pictures]
    width, height = panels[0].size
    texts = [drawable(text)[:400] for text in (*captions, below)]
    fonts = [font_for(text, _letter_height(panels[0])) for text in texts]
    line = max(sum(font.getmetrics()) for font in fonts) + 8
    gap = max(4, width // 100)
    size = (len(panels) * (width + gap) - gap, height + 2 * line)
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for i, (panel, text, font) in enumerate(zip(panels, texts[:-1], fonts[:-1], strict=True)):
        left = i * (width + gap)
        canvas.paste(panel, (left, line))
        draw.text((left + 4, 4), _fitted(text, width - 8, font), fill=(0, 0, 0), font=font)
    text = _fitted(texts[-1], size[0] - 8, fonts[-1])
    draw.text((4, line + height + 4), text, fill=(90, 90, 90), font=fonts[-1])
    return _to_tensor(canvas)


def grid(pictures: Sequence[Tensor]) -> Tensor:
    """Return pictures in rows of equal length, about as many rows as columns.

    Args:
        pictures: (3, H, W) uint8 RGB each, of any sizes; those with a side above 640 pixels are
            resized. Each has a white border.

    Returns:
        (3, H', W') uint8 RGB.
    """
    small = [resize_between(picture, 0, 640)[0] for picture in pictures]
    height, width = (max(picture.shape[side] for picture in small) for side in (1, 2))
    cells = [F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1]), value=255.0) for p in small]
    columns = math.ceil(math.sqrt(len(cells)))
    return make_grid(cells, nrow=columns, padding=4, pad_value=255)


def resize_between(image: Tensor, shortest: int, longest: int) -> tuple[Tensor, float]:
    """Return an image whose longer side is within bounds, and the factor it was resized by.

    Args:
        image: (3, H, W) uint8 RGB.
        shortest: minimum of the longer side, in pixels.
        longest: maximum of the longer side, in pixels.
    """
    picture = _to_pil(image)
    side = max(picture.size)
    factor = min(max(side, shortest), longest) / side
    if factor != 1:
        width, height = (max(1, round(factor * s)) for s in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
    return _to_tensor(picture), factor


def encode_jpeg(image: Tensor, quality: int = 80) -> bytes:
    """Return a (3, H, W) uint8 RGB image as a JPEG file."""
    buffer = io.BytesIO()
    _to_pil(image).save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def save_image(image: Tensor, path: str | Path) -> None:
    """Write an image atomically; the extension (.jpg, .png, ...) selects the format.

    Args:
        image: (3, H, W) uint8 RGB.
        path: the file; its folder is created.

    Raises:
        ValueError: the extension is not one of an image format.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ValueError(f"{path}: not the name of an image file; end it in .jpg or .png")
    with replacing(path) as temporary:
        _to_pil(image).save(temporary, format=kind, **({"quality": 95} if kind == "JPEG" else {}))


def _to_pil(image: Tensor | Image.Image) -> Image.Image:
    """Return a copy as a PIL image in RGB.

    Raises:
        ValueError: the tensor is not uint8 (3, H, W).
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")  # a copy, even if it is RGB already
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"an image to draw on must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}"
        )
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def _to_tensor(canvas: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()  # (3, H, W)


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    """Return a box as PIL draws it, which includes the last pixel."""
    left, top, right, bottom = box
    return left, top, max(left, right - 1), max(top, bottom - 1)


def _draw_dashed(
    draw: ImageDraw.ImageDraw, box: Sequence[float], color: Color, width: int, dash: int
) -> None:
    """Draw a box in dashes of that many pixels."""
    left, top, right, bottom = _corners(box)
    for x1, y1, x2, y2 in (
        (left, top, right, top),
        (left, bottom, right, bottom),
        (left, top, left, bottom),
        (right, top, right, bottom),
    ):
        # n whole dashes and n - 1 gaps of the same length, so that the corners are closed.
        count = max(1, round(((x2 - x1 + y2 - y1) / dash + 1) / 2))
        for k in range(count):
            ends = [2 * k / (2 * count - 1), (2 * k + 1) / (2 * count - 1)]
            draw.line(
                [(x1 + (x2 - x1) * share, y1 + (y2 - y1) * share) for share in ends],
                fill=color,
                width=width,
            )


def _draw_name(canvas: Image.Image, box: Sequence[float], text: str, color: Color) -> None:
    """Write text on a patch of color above the box, or inside it at its top."""
    draw, pad, text = ImageDraw.Draw(canvas), 2, drawable(text)
    font = font_for(text, _letter_height(canvas))
    ascent, descent = font.getmetrics()
    width, height = draw.textlength(text, font=font) + 2 * pad, ascent + descent
    x = min(max(0.0, box[0]), max(0.0, canvas.width - width))
    y = box[1] - height if box[1] >= height else max(0.0, box[1])
    y = min(y, max(0.0, canvas.height - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    # Black on light, white on dark (luma of ITU-R BT.601).
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 128
    draw.text((x + pad, y), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def _letter_height(canvas: Image.Image) -> int:
    """Return the font size for an image, in pixels."""
    return max(11, round(max(canvas.size) / 42))


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    while text and font.getlength(text) > width:
        text = text[:-4] + "..." if len(text) > 4 else ""
    return text
