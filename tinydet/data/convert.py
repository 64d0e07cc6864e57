"""Converts data sets between the layouts of VOC, COCO and YOLO.

What is written is what a training would read: the usable images and objects, with boxes inside
their images. Images are copied as they are.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml

from tinydet.atomic import creating_folder
from tinydet.data import voc
from tinydet.data.annotation import annotation_xml
from tinydet.data.image import probe_image
from tinydet.data.index import Index
from tinydet.data.layouts import LAYOUTS, layout_of
from tinydet.progress import Progress


@dataclass(frozen=True)
class _Item:
    """An image to write.

    Attributes:
        source: its file.
        name: its name in the new data set, without suffix; unique there.
        size: (height, width) of the frame that the boxes refer to.
        boxes: (N, 4) float64 xyxy, continuous and 0-based.
        labels: (N,) class numbers.
        difficult: (N,) bool.
        crowd: (N,) bool.
    """

    source: Path
    name: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray

    @property
    def file(self) -> str:
        return f"{self.name}{self.source.suffix}"


def convert(source: Path, target: Path, layout: str) -> list[str]:
    """Write a data set in another layout; it appears under its name only when it is complete.

    Args:
        source: a folder in VOC, COCO or YOLO layout; all of its splits are converted.
        target: the folder to make.
        layout: "voc", "coco" or "yolo".

    Returns:
        The outcome as lines of text.

    Raises:
        FileExistsError: `target` is there and is not an empty folder.
        FileNotFoundError: `source` has none of the layouts.
        ValueError: a split cannot be read.
    """
    reader = LAYOUTS[layout_of(source)]
    indexes = _read(reader, source)
    lines = [f"{split}: {line}" for split, i in indexes.items() for line in i.problems.summary()]
    classes = next(iter(indexes.values())).classes
    names = _names(indexes)
    items = {split: _items(index, names, layout == "yolo") for split, index in indexes.items()}
    if layout == "yolo":
        items, renamed = _yolo_splits(items)
        lines += renamed
    items, left_out = _fitting(layout, items)
    lines += left_out
    write: dict[str, Callable[[Path, tuple[str, ...], dict[str, list[_Item]]], None]] = {
        "voc": _write_voc,
        "coco": _write_coco,
        "yolo": _write_yolo,
    }
    with creating_folder(target) as folder:
        write[layout](folder, classes, items)
    for split, found in items.items():
        objects = sum(len(item.labels) for item in found)
        lines.append(f"{split}: {len(found)} images, {objects} objects")
    return [*lines, f"wrote {target} ({layout}, {len(classes)} classes)"]


def _read(reader: ModuleType, root: Path) -> dict[str, Index]:
    """Read all splits with the same classes: those of all splits together."""
    indexes = {split: reader.read_index(root, split) for split in reader.split_names(root)}
    classes = tuple(dict.fromkeys(name for i in indexes.values() for name in i.classes))
    if reader is voc:  # which names no order
        classes = tuple(sorted(classes))
    return {
        split: index if index.classes == classes else reader.read_index(root, split, classes)
        for split, index in indexes.items()
    }


def _names(indexes: dict[str, Index]) -> dict[Path, str]:
    """Return a name for each image file: its own, with folders where others have it too.

    COCO's layout has a copy of an image in each of its splits: equal files share a name.
    """
    files = {
        i.image_path(k): file for i in indexes.values() for k, file in enumerate(i.image_files)
    }
    same_stem: dict[str, list[Path]] = {}
    for path in files:
        same_stem.setdefault(path.stem, []).append(path)
    names: dict[Path, str] = {}
    used: set[str] = set()
    for stem, paths in same_stem.items():
        equal = all(filecmp.cmp(paths[0], path, shallow=False) for path in paths[1:])
        for path in paths[:1] if equal else paths:
            name = wanted = stem if equal else os.path.splitext(files[path])[0].replace("/", "_")
            number = 1
            while name in used:
                number += 1
                name = f"{wanted}_{number}"
            used.add(name)
            names |= dict.fromkeys(paths if equal else [path], name)
    return names


def _items(index: Index, names: dict[Path, str], as_viewed: bool) -> list[_Item]:
    """Return a split's images; boxes refer to the image as viewed, else to the stored pixels."""
    items = []
    for i in range(len(index)):
        path, (boxes, labels, difficult) = index.image_path(i), index.objects(i)
        size, boxes = index.size(i), boxes.astype(np.float64)
        orientation = probe_image(path).orientation
        if orientation != 1 and as_viewed != bool(index.exif_rotated[i]):
            boxes = turn_boxes(boxes, size, orientation, back=not as_viewed)
            size = size[::-1] if orientation > 4 else size
        truth = index.coco_truth(i)
        crowd = np.zeros(len(labels), dtype=bool) if truth is None else truth.crowd
        items.append(_Item(path, names[path], size, boxes, labels, difficult, crowd))
    return items


def turn_boxes(
    boxes: np.ndarray, size: tuple[int, int], orientation: int, back: bool = False
) -> np.ndarray:
    """Return boxes of the stored pixels on the image turned by its EXIF orientation.

    Args:
        boxes: (N, 4) xyxy, continuous and 0-based.
        size: (height, width) of the image that they refer to.
        orientation: EXIF orientation, 1 to 8.
        back: turn back from the viewed image to the stored pixels.
    """
    height, width = size
    x1, y1, x2, y2 = boxes.T
    left, right = (x1, x2), (width - x2, width - x1)
    top, bottom = (y1, y2), (height - y2, height - y1)
    if back and orientation in (6, 8):
        orientation = 14 - orientation
    # From the left and from the top of the turned image.
    x, y = {
        1: (left, top),
        2: (right, top),
        3: (right, bottom),
        4: (left, bottom),
        5: (top, left),
        6: (bottom, left),
        7: (bottom, right),
        8: (top, right),
    }[orientation]
    return np.stack([x[0], y[0], x[1], y[1]], axis=1)


def _fitting(
    layout: str, items: dict[str, list[_Item]]
) -> tuple[dict[str, list[_Item]], list[str]]:
    """Leave out the objects that a layout cannot have, and tell how many."""
    if layout == "coco":
        return items, []
    if layout == "yolo":
        why = "difficult objects, which YOLO cannot mark"
    else:
        why = f"objects of at most {voc.SMALLEST:g} pixel, which are empty in VOC's layout"
    kept: dict[str, list[_Item]] = {split: [] for split in items}
    dropped = 0
    for split, found in items.items():
        for item in found:
            sides = item.boxes[:, 2:] - item.boxes[:, :2]
            keep = ~item.difficult if layout == "yolo" else (sides > voc.SMALLEST).all(axis=1)
            dropped += int((~keep).sum())
            parts = {k: getattr(item, k)[keep] for k in ("boxes", "labels", "difficult", "crowd")}
            kept[split].append(replace(item, **parts))
    return kept, [f"left out {dropped} {why}"] if dropped else []


def _yolo_splits(items: dict[str, list[_Item]]) -> tuple[dict[str, list[_Item]], list[str]]:
    """Rename splits so that there is a train and a val, as YOLO needs."""
    lines = []
    for old, new in (("trainval", "train"), ("test", "val")):
        if new not in items and old in items:
            items = {new if split == old else split: found for split, found in items.items()}
            lines.append(f"{old} is now {new}, which YOLO needs")
    return items, lines


def _write_voc(root: Path, classes: tuple[str, ...], splits: dict[str, list[_Item]]) -> None:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for split, items in splits.items():
        for item in _with_progress(split, items):
            _copy(item.source, root / "JPEGImages" / item.file)
            boxes = (item.boxes + np.array([1, 1, 0, 0])).astype(np.float32).tolist()
            objects = zip((classes[k] for k in item.labels), boxes, item.difficult, strict=True)
            content = annotation_xml(item.file, item.size, objects)
            file = root / "Annotations" / f"{item.name}.xml"
            _write_once(file, content, split, item)
        lines = "".join(f"{item.name}\n" for item in items)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines, encoding="utf-8")


def _write_coco(root: Path, classes: tuple[str, ...], splits: dict[str, list[_Item]]) -> None:
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    for split, items in splits.items():
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, item in enumerate(_with_progress(split, items), 1):
            _copy(item.source, root / split / item.file)
            height, width = item.size
            images.append({"id": number, "file_name": item.file, "height": height, "width": width})
            for box, label, difficult, crowd in zip(
                item.boxes.tolist(), item.labels.tolist(), item.difficult, item.crowd, strict=True
            ):
                x1, y1, x2, y2 = box
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(crowd),
                        "ignore": int(difficult and not crowd),
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        file = root / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content), encoding="utf-8")


def _write_yolo(root: Path, classes: tuple[str, ...], splits: dict[str, list[_Item]]) -> None:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for split, items in splits.items():
        for item in _with_progress(split, items):
            _copy(item.source, root / "images" / item.file)
            height, width = item.size
            lines = []
            for (x1, y1, x2, y2), label in zip(item.boxes.tolist(), item.labels, strict=True):
                box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
                sides = ((x2 - x1) / width, (y2 - y1) / height)
                lines.append(" ".join(map(repr, (int(label), *box, *sides))) + "\n")
            _write_once(root / "labels" / f"{item.name}.txt", "".join(lines).encode(), split, item)
        images = "".join(f"./images/{item.file}\n" for item in items)
        (root / f"{split}.txt").write_text(images, encoding="utf-8")
    content = {split: f"{split}.txt" for split in splits} | {"names": dict(enumerate(classes))}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    (root / "data.yaml").write_text(text, encoding="utf-8")


def _with_progress(split: str, items: list[_Item]) -> Iterator[_Item]:
    with Progress(f"writing {split}", len(items), "images") as progress:
        for item in items:
            yield item
            progress.advance()


def _write_once(path: Path, content: bytes, split: str, item: _Item) -> None:
    if path.exists() and path.read_bytes() != content:
        raise ValueError(
            f"{item.source}: the image has other objects in {split} than in another split; only "
            "COCO's layout can have both"
        )
    path.write_bytes(content)


def _copy(source: Path, target: Path) -> None:
    if not target.exists():  # An image may be in several splits.
        shutil.copyfile(source, target)
