"""Draw what a detector got wrong: truth dashed, detections solid, mistakes thick and named."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tinydet.report.draw import Color, draw_name, to_pil

# Blue and orange of Okabe and Ito: told apart by colour-blind readers, and bright on photographs.
TRUTH_COLOR: Color = (86, 180, 233)
DETECTION_COLOR: Color = (230, 159, 0)
_LONGEST_NAME = 24  # characters


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
        truth_names: a name for each, written if it was missed.
        missed: (M,) bool.
        found: (N, 4) xyxy pixels of detections.
        found_names: a name for each, written if it is wrong.
        wrong: (N,) bool.

    Returns:
        (3, H, W) uint8 RGB on the CPU.
    """
    canvas = to_pil(image)
    draw = ImageDraw.Draw(canvas)
    longest = max(canvas.size)
    thin, thick = max(1, round(longest / 500)), max(2, round(longest / 180))
    font = ImageFont.load_default(size=max(11, round(longest / 42)))
    # Right ones below, and all names above all boxes.
    for is_error in (False, True):
        width = thick if is_error else thin
        for box in np.asarray(found)[np.asarray(wrong, bool) == is_error]:
            _draw_box(draw, box.tolist(), DETECTION_COLOR, width, dash=0)
        for box in np.asarray(truth)[np.asarray(missed, bool) == is_error]:
            _draw_box(draw, box.tolist(), TRUTH_COLOR, width, dash=max(4, longest // 70))
    named = [
        *zip(truth, truth_names, missed, [TRUTH_COLOR] * len(truth), strict=True),
        *zip(found, found_names, wrong, [DETECTION_COLOR] * len(found), strict=True),
    ]
    for box, name, is_error, color in named:
        if is_error:
            draw_name(draw, canvas.size, list(box), _one_line(name), color, font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()  # (3, H, W)


def _draw_box(
    draw: ImageDraw.ImageDraw, box: Sequence[float], color: Color, width: int, dash: int
) -> None:
    """Draw a box with a dark rim, in dashes of that many pixels; 0 is a solid line."""
    left, top = box[0], box[1]
    right, bottom = max(left, box[2] - 1), max(top, box[3] - 1)  # PIL includes the last
    for line, ink in ((width + 2, (0, 0, 0)), (width, color)):
        if not dash:
            draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], outline=ink, width=line)
            continue
        for x1, y1, x2, y2 in (
            (left, top, right, top),
            (right, top, right, bottom),
            (right, bottom, left, bottom),
            (left, bottom, left, top),
        ):
            length = abs(x2 - x1) + abs(y2 - y1)
            count = max(1, round((length / dash + 1) / 2))  # whole dashes: corners are closed
            unit = length / (2 * count - 1)
            for k in range(count):
                a, b = (2 * k * unit / (length or 1), (2 * k + 1) * unit / (length or 1))
                ends = [
                    (x1 + (x2 - x1) * share, y1 + (y2 - y1) * share) for share in (a, min(b, 1.0))
                ]
                draw.line(ends, fill=ink, width=line)


def _one_line(name: str) -> str:
    """Return a name that can be drawn, whatever it holds."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."


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
