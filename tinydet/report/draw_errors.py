"""Draw what a detector got wrong: truth dashed, detections solid, mistakes thick and named."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tinydet.report.draw import Color, draw_name, letter_size, to_pil
from tinydet.report.fonts import drawable, font_for

# Blue and orange of Okabe and Ito: told apart by colour-blind readers, and bright on photographs.
TRUTH_COLOR: Color = (86, 180, 233)
DETECTION_COLOR: Color = (230, 159, 0)
_LONGEST_NAME = 24  # characters
_MOST_NAMES = 8  # of each kind; more would hide the image


def draw_errors(
    image: Tensor | Image.Image,
    truth: np.ndarray,
    truth_names: Sequence[str],
    missed: np.ndarray,
    found: np.ndarray,
    found_names: Sequence[str],
    wrong: np.ndarray,
) -> Tensor:
    """Return a copy of the image with ground truth and detections.

    Args:
        image: (3, H, W) uint8 RGB, or a PIL image.
        truth: (M, 4) xyxy pixels of annotated boxes.
        truth_names: a name for each; those of the first few that were missed are written.
        missed: (M,) bool.
        found: (N, 4) xyxy pixels of detections, by descending score.
        found_names: a name for each; those of the first few that are wrong are written.
        wrong: (N,) bool.

    Returns:
        (3, H, W) uint8 RGB on the CPU.
    """
    canvas = to_pil(image)
    draw, letter = ImageDraw.Draw(canvas), letter_size(canvas)
    longest = max(canvas.size)
    thin, thick = max(1, round(longest / 400)), max(2, round(longest / 160))
    # Right ones below, and all names above all boxes.
    for is_error in (False, True):
        width = thick if is_error else thin
        for box in np.asarray(found)[np.asarray(wrong, bool) == is_error]:
            _draw_box(draw, box.tolist(), DETECTION_COLOR, width, dash=0)
        for box in np.asarray(truth)[np.asarray(missed, bool) == is_error]:
            _draw_box(draw, box.tolist(), TRUTH_COLOR, width, dash=max(4, longest // 70))
    for boxes, names, is_error, color in (
        (found, found_names, wrong, DETECTION_COLOR),
        (truth, truth_names, missed, TRUTH_COLOR),
    ):
        # The last are drawn on top.
        for i in np.flatnonzero(is_error)[:_MOST_NAMES][::-1]:
            draw_name(draw, canvas.size, list(boxes[i]), _one_line(names[i]), color, letter)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()  # (3, H, W)


def _draw_box(
    draw: ImageDraw.ImageDraw, box: Sequence[float], color: Color, width: int, dash: int
) -> None:
    """Draw a box, in dashes of that many pixels; 0 is a solid line."""
    left, top = box[0], box[1]
    right, bottom = max(left, box[2] - 1), max(top, box[3] - 1)  # PIL includes the last
    if not dash:
        draw.rectangle([left, top, right, bottom], outline=color, width=width)
        return
    for x1, y1, x2, y2 in (
        (left, top, right, top),
        (left, bottom, right, bottom),
        (left, top, left, bottom),
        (right, top, right, bottom),
    ):
        # Whole dashes, n of them and n - 1 gaps as long: the corners are closed.
        count = max(1, round(((x2 - x1 + y2 - y1) / dash + 1) / 2))
        for k in range(count):
            ends = [2 * k / (2 * count - 1), (2 * k + 1) / (2 * count - 1)]
            draw.line(
                [(x1 + (x2 - x1) * share, y1 + (y2 - y1) * share) for share in ends],
                fill=color,
                width=width,
            )


def _one_line(name: str) -> str:
    """Return a name that can be drawn, whatever it holds."""
    name = drawable(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."


def side_by_side(pictures: Sequence[Tensor], captions: Sequence[str], below: str) -> Tensor:
    """Return pictures of the same image in a row, each under its caption.

    Args:
        pictures: (3, H, W) uint8 RGB, all of one size.
        captions: a line for each; what does not fit is cut off.
        below: a line below them.

    Returns:
        (3, H', W') uint8 RGB.
    """
    panels = [to_pil(picture) for picture in pictures]
    width, height = panels[0].size
    letter = max(11, round(width / 42))
    texts = [drawable(text)[:400] for text in (*captions, below)]
    fonts = [font_for(text, letter) for text in texts]
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
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    while text and font.getlength(text) > width:
        text = text[:-4] + "..." if len(text) > 4 else ""
    return text


def resize_between(image: Tensor, shortest: int, longest: int) -> tuple[Tensor, float]:
    """Return an image whose longer side is within bounds, and the factor it was resized by.

    Args:
        image: (3, H, W) uint8 RGB.
        shortest: least number of pixels of the longer side.
        longest: largest number.
    """
    picture = to_pil(image)
    side = max(picture.size)
    factor = min(max(side, shortest), longest) / side
    if factor != 1:
        size = tuple(max(1, round(factor * s)) for s in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous(), factor


def encode_jpeg(image: Tensor, quality: int = 80) -> bytes:
    """Return a (3, H, W) uint8 RGB image as a JPEG file."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
