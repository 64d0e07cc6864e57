"""A folder in VOC layout, written by hand, as small and as dirty as a test asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BCCD = Path(__file__).resolve().parents[2] / "../shared/BCCD"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TINYDET_CACHE", str(folder))
    return folder


@pytest.fixture
def bccd():
    if not BCCD.is_dir():
        pytest.skip("../shared/BCCD is not here")
    return BCCD


class VocTree:
    def __init__(self, root: Path) -> None:
        self.root = root
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / part).mkdir(parents=True)

    def image(self, name, size=(60, 40), mode="RGB", orientation=None, suffix=".jpg"):
        """Write an image of size (width, height)."""
        width, height = size
        ys, xs = np.mgrid[:height, :width]
        pixels = np.stack([xs * 255 // width, ys * 255 // height, xs * 0 + 80], axis=-1)
        image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        image.save(self.root / "JPEGImages" / f"{name}{suffix}", exif=exif)

    def annotation(self, name, objects=(), stated=(60, 40)):
        """Write an annotation of objects (class, (xmin, ymin, xmax, ymax)[, difficult])."""
        text = "<annotation>"
        if stated:
            text += f"<size><width>{stated[0]}</width><height>{stated[1]}</height></size>"
        for kind, box, *difficult in objects:
            keys = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            bounds = "".join(f"<{k}>{v}</{k}>" for k, v in keys)
            text += f"<object><name>{kind}</name><difficult>{int(any(difficult))}</difficult>"
            text += f"<bndbox>{bounds}</bndbox></object>"
        (self.root / "Annotations" / f"{name}.xml").write_text(text + "</annotation>")

    def add(self, name, objects=(("cat", (10, 10, 30, 30)),), size=(60, 40), stated=None, **image):
        self.image(name, size, **image)
        self.annotation(name, objects, stated or size)

    def split(self, *lines, name="train"):
        text = "".join(f"{line}\n" for line in lines)
        (self.root / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
        return self.root


@pytest.fixture
def tree(tmp_path):
    return VocTree(tmp_path / "voc")
