"""The drawing behind the synthetic data set: ground, shapes and strokes on a float canvas.

A canvas is (H, W, 3) float32 RGB in 0..255, changed in place.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "ring", "square", "star", "triangle")
_SUPERSAMPLING = 4


def shape_mask(kind: str, diameter: float, angle: float) -> np.ndarray:
    """Return how much of each pixel a shape covers.

    Args:
        kind: one of `SHAPES`.
        diameter: of the circle around the shape, in pixels.
        angle: turn in radians.

    Returns:
        (h, w) float32 in [0, 1], cut to the pixels that are at least half covered and one more.
    """
    side = int(np.ceil(diameter)) + 4
    centre, radius = side * _SUPERSAMPLING / 2, diameter * _SUPERSAMPLING / 2
    image = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    if kind in ("circle", "ring"):
        # Inscribed shapes look smaller: round ones are a little smaller than their circle.
        outer = radius * 0.9
        draw.ellipse([centre - outer] * 2 + [centre + outer] * 2, fill=255)
        if kind == "ring":
            inner = outer * 0.55
            draw.ellipse([centre - inner] * 2 + [centre + inner] * 2, fill=0)
    else:
        points = _outline(kind)
        cosine, sine = np.cos(angle), np.sin(angle)
        turned = points @ np.array([[cosine, sine], [-sine, cosine]])
        draw.polygon([tuple(p) for p in (centre + radius * turned).tolist()], fill=255)
    mask = np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.float32) / 255
    ys, xs = np.nonzero(mask > 0.5)
    return mask[ys.min() - 1 : ys.max() + 2, xs.min() - 1 : xs.max() + 2]


def _outline(kind: str) -> np.ndarray:
    """Return the corners (P, 2) of a shape in the unit circle."""
    if kind == "cross":
        arm, half = 0.95, 0.31
        quarter = np.array([[half, half], [half, arm], [-half, arm]])
        turn = np.array([[0, 1], [-1, 0]])
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])
    corners, inner = {"square": (4, None), "triangle": (3, None), "star": (5, 0.42)}[kind]
    count = corners * (2 if inner else 1)
    radii = np.where(np.arange(count) % 2, inner or 1.0, 1.0)
    angles = 2 * np.pi * np.arange(count) / count
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def draw_background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a canvas with a gradient of two colours, soft clouds and perhaps stripes."""
    ys, xs = np.mgrid[:size, :size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.7 * ((xs - 0.5) * np.cos(angle) + (ys - 0.5) * np.sin(angle))
    first, second = rng.uniform(20, 235, (2, 3))
    second = first + (second - first) * rng.uniform(0.2, 0.8)
    canvas = first + (second - first) * ramp[..., None]
    cells = int(rng.integers(3, 12))
    clouds = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    clouds = np.asarray(Image.fromarray(clouds).resize((size, size), Image.Resampling.BICUBIC))
    canvas += clouds[..., None] * rng.uniform(5, 35) * rng.uniform(0.4, 1, 3)
    if rng.random() < 0.4:
        canvas += (rng.uniform(4, 16) * _stripes((size, size), rng))[..., None]
    return np.clip(canvas, 0, 255).astype(np.float32)


def _stripes(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return stripes (H, W) of values in [-1, 1], in any direction."""
    ys, xs = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 20)
    phase = 2 * np.pi * (xs * np.cos(angle) + ys * np.sin(angle)) / period
    return np.tanh(2 * np.sin(phase))


def pick_color(area: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a colour (3,) that can be told from what the shape is painted on."""
    weight = mask[..., None] + 1e-6
    under = (area * weight).sum((0, 1)) / weight.sum()
    for _ in range(20):
        color = rng.uniform(0, 255, 3)
        if np.linalg.norm(color - under) > 75:
            break
    return color


def paint_shape(
    area: np.ndarray, mask: np.ndarray, color: np.ndarray, rng: np.random.Generator
) -> None:
    """Paint a shape in one colour, shaded, and perhaps striped or speckled."""
    height, width = mask.shape
    ys, xs = np.mgrid[:height, :width].astype(np.float32) / max(height, width)
    shade = rng.uniform(-35, 35) * (xs - 0.5) + rng.uniform(-35, 35) * (ys - 0.5)
    fill = color + shade[..., None]
    style = rng.random()
    if style < 0.25:
        fill = fill + (rng.uniform(8, 22) * _stripes(mask.shape, rng))[..., None]
    elif style < 0.5:
        fill = fill + rng.normal(0, rng.uniform(5, 18), (height, width, 1))
    area += mask[..., None] * (np.clip(fill, 0, 255) - area)


def draw_strokes(canvas: np.ndarray, count: int, rng: np.random.Generator) -> None:
    """Draw lines, arcs and dots: things that are no object of any class."""
    if not count:
        return
    size = len(canvas)
    image = Image.fromarray(canvas.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        color = tuple(int(c) for c in rng.integers(0, 256, 3))
        x1, y1, x2, y2 = (int(v) for v in rng.integers(0, size, 4))
        width = int(rng.integers(1, 4))
        style = rng.random()
        if style < 0.4:
            draw.line([x1, y1, x2, y2], fill=color, width=width)
        elif style < 0.7:
            frame = [min(x1, x2), min(y1, y2), max(x1, x2) + 4, max(y1, y2) + 4]
            start = int(rng.integers(0, 360))
            draw.arc(frame, start, start + int(rng.integers(40, 160)), fill=color, width=width)
        else:
            radius = int(rng.integers(2, 6))
            draw.ellipse([x1 - radius, y1 - radius, x1 + radius, y1 + radius], fill=color)
    canvas[:] = np.asarray(image, dtype=np.float32)


def add_noise(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the canvas with camera noise, as (H, W, 3) uint8."""
    noise = rng.normal(0, rng.uniform(1, 9), canvas.shape)
    return np.clip(canvas + noise + 0.5, 0, 255).astype(np.uint8)
