"""A synthetic detection set in VOC layout: rotated, textured, overlapping shapes on busy ground.

It needs no download and is made in seconds. A small network learns it from scratch within minutes,
but not fully: shapes differ widely in size, hide each other, and share colours with the ground.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from tinydet.data.shape_drawing import (
    SHAPES,
    add_noise,
    draw_background,
    draw_strokes,
    paint_shape,
    pick_color,
    shape_mask,
)

logger = logging.getLogger(__name__)

# Of a shape's area: less visible than the first is marked difficult, less than the second is not
# annotated at all.
_DIFFICULT_BELOW = 0.3
_UNSEEN_BELOW = 0.08
_SMALLEST, _LARGEST = 30, 110  # diameter in pixels of a 224-pixel image


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
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        temporary.chmod(0o755)
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (temporary / folder).mkdir(parents=True)
        for number, (split, count) in enumerate((("trainval", num_train), ("test", num_test))):
            names = [f"{split}_{i:05d}" for i in range(count)]
            for i, name in enumerate(names):
                # An image depends on its own number only, not on how many there are.
                rng = np.random.default_rng([seed, number, i])
                _write_image(temporary, name, image_size, rng)
            lines = "".join(f"{name}\n" for name in names)
            (temporary / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
        try:
            os.rename(temporary, root)
        except OSError:
            if not (root / "ImageSets" / "Main" / "test.txt").is_file():
                raise
            logger.info("%s was rendered by another process meanwhile", root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_image(root: Path, name: str, image_size: int, rng: np.random.Generator) -> None:
    pixels, owner, kinds, areas = draw_scene(image_size, rng)
    objects = annotate(owner, kinds, areas)
    image = Image.fromarray(pixels)
    image.save(root / "JPEGImages" / f"{name}.jpg", quality=90, subsampling=0)
    _write_annotation(root / "Annotations" / f"{name}.xml", name, image_size, objects)


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


def _write_annotation(
    path: Path,
    name: str,
    size: int,
    objects: list[tuple[str, tuple[int, int, int, int], bool]],
) -> None:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{name}.jpg"
    frame = ElementTree.SubElement(root, "size")
    for key, value in (("width", size), ("height", size), ("depth", 3)):
        ElementTree.SubElement(frame, key).text = str(value)
    for kind, box, difficult in objects:
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = kind
        ElementTree.SubElement(item, "difficult").text = str(int(difficult))
        bounds = ElementTree.SubElement(item, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(bounds, key).text = str(value)
    ElementTree.indent(root)
    path.write_bytes(ElementTree.tostring(root))
