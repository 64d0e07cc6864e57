"""A synthetic detection set in VOC layout: rotated, textured, overlapping shapes on busy ground.

It needs no download and is rendered in seconds. A small network learns it from scratch in minutes,
but not perfectly: shapes differ widely in size, occlude each other, and share the ground's colours.
Drawing functions change a canvas (H, W, 3) float32 RGB in 0..255 in place.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tinydet.atomic import creating_folder
from tinydet.data.annotation import annotation_xml
from tinydet.progress import Progress

logger = logging.getLogger(__name__)

# Visible fraction of a shape below which it is marked difficult, or is not annotated.
_DIFFICULT_BELOW = 0.3
_UNSEEN_BELOW = 0.08
_SMALLEST, _LARGEST = 30, 110  # diameter in pixels of a 224-pixel image
SHAPES = ("circle", "cross", "ring", "square", "star", "triangle")
_SUPERSAMPLING = 4


def render_shapes(
    root: str | Path,
    num_train: int = 600,
    num_test: int = 150,
    image_size: int = 224,
    seed: int = 0,
) -> None:
    """Render the data set; the same arguments give the same bytes.

    It appears under its name only when it is complete. If another process was faster, its
    result is left as it is.

    Args:
        root: the folder to make, with the splits "trainval" and "test".
        num_train: images in "trainval".
        num_test: images in "test".
        image_size: side of the square images in pixels.
        seed: another seed is another set.

    Raises:
        FileExistsError: `root` exists and is not an empty folder.
        ValueError: a number is out of range.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root}: exists already; remove it to render it anew")
    if min(num_train, num_test) < 1 or image_size < 64:
        raise ValueError(
            f"num_train={num_train}, num_test={num_test}, image_size={image_size}: "
            "the counts must be at least 1 and the size at least 64"
        )
    try:
        with creating_folder(root) as folder:
            _render(folder, {"trainval": num_train, "test": num_test}, image_size, seed)
    except FileExistsError:
        if not (root / "ImageSets" / "Main" / "test.txt").is_file():
            raise
        logger.info("%s was rendered by another process meanwhile", root)


def _render(root: Path, splits: dict[str, int], image_size: int, seed: int) -> None:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    with Progress("rendering", sum(splits.values()), "images") as progress:
        for number, (split, count) in enumerate(splits.items()):
            names = [f"{split}_{i:05d}" for i in range(count)]
            for i, name in enumerate(names):
                # An image depends on its own number only, not on how many there are.
                rng = np.random.default_rng([seed, number, i])
                _write_image(root, name, image_size, rng)
                progress.advance()
            lines = "".join(f"{name}\n" for name in names)
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)


def _write_image(root: Path, name: str, image_size: int, rng: np.random.Generator) -> None:
    pixels, owner, kinds, areas = draw_scene(image_size, rng)
    objects = annotate(owner, kinds, areas)
    image = Image.fromarray(pixels)
    image.save(root / "JPEGImages" / f"{name}.jpg", quality=90, subsampling=0)
    annotation = annotation_xml(f"{name}.jpg", (image_size, image_size), objects)
    (root / "Annotations" / f"{name}.xml").write_bytes(annotation)


def draw_scene(
    size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[str], list[int]]:
    """Draw one image.

    Args:
        size: side of the image in pixels.
        rng: every random number is drawn from it.

    Returns:
        The image (size, size, 3) uint8 RGB; for each pixel the number of the shape that is seen
        there, (size, size) int, -1 on the ground; the shapes' kinds; and their areas in pixels as
        if nothing hid them.
    """
    canvas = draw_background(size, rng)
    draw_strokes(canvas, int(rng.integers(0, 6)), rng)
    owner = np.full((size, size), -1, dtype=np.int64)
    kinds: list[str] = []
    areas: list[int] = []
    unit = size / 224
    for number in range(int(rng.integers(1, 6))):
        kind = SHAPES[int(rng.integers(len(SHAPES)))]
        diameter = unit * np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST)))
        mask = shape_mask(kind, diameter, rng.uniform(0, 2 * np.pi))  # (h, w) in [0, 1]
        height, width = mask.shape
        # Up to a fifth of a shape may lie outside the image.
        top = int(rng.integers(-height // 5, max(1, size - height * 4 // 5)))
        left = int(rng.integers(-width // 5, max(1, size - width * 4 // 5)))
        y1, x1, y2, x2 = max(0, top), max(0, left), min(size, top + height), min(size, left + width)
        seen = mask[y1 - top : y2 - top, x1 - left : x2 - left]
        area = canvas[y1:y2, x1:x2]
        paint_shape(area, seen, pick_color(area, seen, rng), rng)
        owner[y1:y2, x1:x2][seen > 0.5] = number
        kinds.append(kind)
        areas.append(int((mask > 0.5).sum()))
    draw_strokes(canvas, int(rng.integers(0, 2)), rng)
    return add_noise(canvas, rng), owner, kinds, areas


def annotate(
    owner: np.ndarray, kinds: list[str], areas: list[int]
) -> list[tuple[str, tuple[int, int, int, int], bool]]:
    """Return (kind, box, difficult) of the shapes that are seen well enough.

    Boxes bound what is seen of a shape: xmin, ymin, xmax, ymax, 1-based and inclusive.
    """
    objects = []
    for number, (kind, area) in enumerate(zip(kinds, areas, strict=True)):
        ys, xs = np.nonzero(owner == number)
        visible = len(ys) / area
        if visible < _UNSEEN_BELOW or np.ptp(ys) < 1 or np.ptp(xs) < 1:
            continue
        box = (int(xs.min()) + 1, int(ys.min()) + 1, int(xs.max()) + 1, int(ys.max()) + 1)
        objects.append((kind, box, visible < _DIFFICULT_BELOW))
    return objects


def shape_mask(kind: str, diameter: float, angle: float) -> np.ndarray:
    """Return how much of each pixel a shape covers.

    Args:
        kind: one of `SHAPES`.
        diameter: of the circle around the shape, in pixels.
        angle: rotation in radians.

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
        rotated = points @ np.array([[cosine, sine], [-sine, cosine]])
        draw.polygon([tuple(p) for p in (centre + radius * rotated).tolist()], fill=255)
    mask = np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.float32) / 255
    ys, xs = np.nonzero(mask > 0.5)
    return mask[ys.min() - 1 : ys.max() + 2, xs.min() - 1 : xs.max() + 2]


def _outline(kind: str) -> np.ndarray:
    """Return the corners (P, 2) of a shape in the unit circle."""
    if kind == "cross":
        arm, half = 0.95, 0.31
        quarter = np.array([[half, half], [half, arm], [-half, arm]])
        quarter_turn = np.array([[0, 1], [-1, 0]])
        return np.concatenate([quarter @ np.linalg.matrix_power(quarter_turn, i) for i in range(4)])
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
    """Draw a colour (3,) that differs from what the shape is painted on."""
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
    """Draw lines, arcs and dots, which belong to no class."""
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
