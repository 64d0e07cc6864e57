"""Folders in VOC and COCO layout, written by hand, as small and as dirty as a test asks for."""

from __future__ import annotations

import json
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


def write_image(path, size, mode="RGB", orientation=None):
    width, height = size
    ys, xs = np.mgrid[:height, :width]
    pixels = np.stack([xs * 255 // width, ys * 255 // height, xs * 0 + 80], axis=-1)
    image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif)


class VocTree:
    def __init__(self, root: Path) -> None:
        self.root = root
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / part).mkdir(parents=True)

    def image(self, name, size=(60, 40), mode="RGB", orientation=None, suffix=".jpg"):
        """Write an image of size (width, height)."""
        write_image(self.root / "JPEGImages" / f"{name}{suffix}", size, mode, orientation)

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


class CocoTree:
    """One split at a time: gather images and objects, then `write` them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "annotations").mkdir(parents=True)
        self.start("train")

    def start(self, split):
        self.split, self.images, self.objects = split, [], []
        self.categories = [{"id": i, "name": n} for i, n in ((2, "cat"), (90, "bus"), (7, "dog"))]
        (self.root / split).mkdir(exist_ok=True)

    def image(self, number, size=(60, 40), stated=None, file=None, **image):
        """Write an image of size (width, height)."""
        file = file or f"{number:012d}.jpg"
        write_image(self.root / self.split / file, size, **image)
        width, height = stated or size
        row = {"id": number, "file_name": file, "width": width, "height": height}
        self.images.append(row)

    def object(self, image, category, box, area=None, crowd=0, **more):
        """Add an object; box is (x, y, width, height)."""
        row = {"id": len(self.objects) + 1, "image_id": image, "category_id": category}
        area = box[2] * box[3] if area is None else area
        row |= {"bbox": list(box), "area": area, "iscrowd": crowd, "segmentation": [[1, 2, 3]]}
        self.objects.append(row | more)

    @property
    def file(self):
        return self.root / "annotations" / f"instances_{self.split}.json"

    def write(self):
        parts = {"info": {}, "images": self.images, "annotations": self.objects}
        self.file.write_text(json.dumps(parts | {"categories": self.categories}))
        return self.root


@pytest.fixture
def coco_tree(tmp_path):
    return CocoTree(tmp_path / "coco")


class YoloTree:
    """A folder as Ultralytics writes it: `data.yaml`, `images/SPLIT/` and `labels/SPLIT/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.yaml("train: images/train\nval: images/val\nnames: [cat, dog, bus]\n")

    def yaml(self, text):
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "data.yaml").write_text(text, encoding="utf-8")

    def image(self, name, labels=None, split="train", size=(60, 40), suffix=".jpg", **kwargs):
        """Write an image of size (width, height), and its label file of text or bytes."""
        for part in ("images", "labels"):
            (self.root / part / split).mkdir(parents=True, exist_ok=True)
        write_image(self.root / "images" / split / f"{name}{suffix}", size, **kwargs)
        if labels is not None:
            data = labels if isinstance(labels, bytes) else labels.encode()
            (self.root / "labels" / split / f"{name}.txt").write_bytes(data)


@pytest.fixture
def yolo_tree(tmp_path):
    return YoloTree(tmp_path / "yolo")
