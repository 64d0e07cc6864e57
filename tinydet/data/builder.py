"""Checks images and their objects, and builds the index of what is usable."""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from tinydet.data.annotation import class_name, parse_flag
from tinydet.data.image import ImageInfo, probe_image
from tinydet.data.index import CocoTruth, Index
from tinydet.data.problems import Problems

# Coordinates are often rounded: a box may be this many pixels outside its image without a word.
_ROUNDING = 0.02
_EMPTY = 0.001  # side in pixels below which a box may be empty in float32

Box = tuple[float, float, float, float]


class FoundObject(NamedTuple):
    """An object as its annotation has it.

    Attributes:
        name: class name.
        box: (x1, y1, x2, y2) in continuous, 0-based pixels; None if it cannot be read.
        text: the box as the file states it, for messages.
        marks: field -> value, for `parse_flag`: marks that leave the object out of training. COCO's
            "iscrowd" is one of them.
        area: of its mask in pixels, for COCO's evaluation; None takes the box's.
    """

    name: str
    box: Box | None
    text: str = ""
    marks: Mapping[str, object] = MappingProxyType({})
    area: float | None = None


def check_image(
    name: str,
    path: Path,
    stated: tuple[int, int] | None,
    problems: Problems,
    as_viewed: bool = False,
) -> tuple[tuple[int, int], bool] | None:
    """Check an image file, and count its problems.

    Args:
        name: what `problems` calls the image.
        path: the file.
        stated: (height, width) that the annotation states; None if it states none.
        problems: added to.
        as_viewed: boxes always refer to the image as viewers show it, turned by its EXIF
            orientation.

    Returns:
        The (height, width) that the boxes refer to, and whether the EXIF orientation has to be
        applied; None if the image cannot be read, or its name is not Unicode text.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        problems.add("bad_name", name)
        return None
    try:
        info = probe_image(path)
    except (ValueError, OSError) as error:
        problems.add("bad_image", name, str(error).removeprefix(f"{path}: "))
        return None
    if info.mode != "RGB":
        problems.add("not_rgb", name, info.mode)
    if as_viewed:
        exif_rotated = info.orientation != 1
    else:
        exif_rotated = _decide_orientation(name, info, stated, problems)
    size = info.rotated_size if exif_rotated else info.size
    if stated is not None and stated != size:
        what = f"{stated[1]}x{stated[0]}, is {size[1]}x{size[0]}"
        problems.add("wrong_size", name, what)
    return size, exif_rotated


def _decide_orientation(
    name: str, info: ImageInfo, stated: tuple[int, int] | None, problems: Problems
) -> bool:
    """Whether boxes refer to the rotated image: only if its size alone is the stated one."""
    if info.orientation == 1:
        return False
    exif_rotated = info.size != info.rotated_size and stated == info.rotated_size
    rule = "exif_applied" if exif_rotated else "exif_ignored"
    problems.add(rule, name, f"orientation {info.orientation}")
    return exif_rotated


def check_names(names: Mapping[int, str], classes: Iterable[str], problems: Problems) -> None:
    """Count names that several categories have, and classes that none has.

    Args:
        names: of the data set's categories, by number.
        classes: class names that were asked for.
        problems: added to.
    """
    first: dict[str, int] = {}
    for number, name in names.items():
        if name and first.setdefault(name, number) != number:
            problems.add("same_name", name, f"categories {first[name]} and {number}")
    for name in classes:
        if class_name(name) not in first:
            near = difflib.get_close_matches(name, first, 1)
            problems.add("absent_class", name, f"did you mean {near[0]}?" if near else "")


class IndexBuilder:
    """Collects checked images and their objects, and counts problems.

    Args:
        classes: class names in label order; empty takes the names found, sorted.
        smallest: sides of a box, in pixels, that are too small to have an area.
        coco: whether the index gets what COCO's evaluation needs.
    """

    def __init__(
        self, classes: tuple[str, ...], smallest: float = _EMPTY, coco: bool = False
    ) -> None:
        self.problems = Problems()
        self.classes = classes
        self.smallest = smallest
        self.coco = coco
        self.known = set(map(class_name, classes))
        self.image_ids: list[str] = []
        self.files: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.exif_rotated: list[bool] = []
        self.offsets = [0]
        # Of all objects; flat arrays of numbers, since COCO has 860,000.
        self.names: list[str] = []
        self.stated, self.clipped, self.areas = array("d"), array("f"), array("d")
        self.crowd, self.difficult = bytearray(), bytearray()

    def add_image(
        self,
        name: str,
        file: str,
        checked: tuple[tuple[int, int], bool],
        objects: Iterable[FoundObject],
        image_id: str = "",
    ) -> None:
        """Add an image and those of its objects that are usable.

        Args:
            name: what `problems` calls the image.
            file: its path below the data set's folder.
            checked: what `check_image` returned.
            objects: in the annotation's order.
            image_id: its name in the index; `name` if empty.
        """
        size, exif_rotated = checked
        for item in objects:
            label = item.name if item.name in self.known else class_name(item.name)
            clipped = self._check_object(name, label, item, size)
            if clipped is None or item.box is None:
                continue
            marks = {key: parse_flag(value) for key, value in item.marks.items()}
            for key, mark in marks.items():
                if mark is None:
                    what = f"{label}, {key} is {item.marks[key]!r}"
                    self.problems.add("unclear_mark", name, what)
            x1, y1, x2, y2 = item.box
            self.names.append(label)
            self.stated.extend(item.box)
            self.clipped.extend(clipped)
            self.areas.append((x2 - x1) * (y2 - y1) if item.area is None else item.area)
            self.crowd.append(bool(marks.get("iscrowd")))
            self.difficult.append(any(marks.values()))
        self.image_ids.append(image_id or name)
        self.files.append(file)
        self.sizes.append(size)
        self.exif_rotated.append(exif_rotated)
        self.offsets.append(len(self.names))

    def _check_object(
        self, name: str, label: str, item: FoundObject, size: tuple[int, int]
    ) -> Box | None:
        """Return the object's box inside the image, or None if it is dropped."""
        if not label:
            self.problems.add("no_class_name", name, item.text)
            return None
        if item.box is None:
            self.problems.add("bad_box", name, f"{label} {item.text}".rstrip())
            return None
        x1, y1, x2, y2 = item.box
        what = f"{label} {item.text}"
        if min(x2 - x1, y2 - y1) <= self.smallest:
            self.problems.add("zero_area", name, what)
            return None
        if self.classes and label not in self.known:
            self.problems.add("unknown_class", name, label)
            counts = self.problems.unknown_classes
            counts[label] = counts.get(label, 0) + 1
            return None
        height, width = size
        clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
        if min(clipped[2] - clipped[0], clipped[3] - clipped[1]) <= _EMPTY:
            self.problems.add("outside", name, f"{what} in {width}x{height}")
            return None
        if max(abs(a - b) for a, b in zip(clipped, item.box, strict=True)) > _ROUNDING:
            self.problems.add("clipped", name, f"{what} in {width}x{height}")
        return clipped

    def check_classes(self) -> None:
        """Count classes that were asked for and have no object, where no list of classes tells."""
        found = set(self.names)
        for name in self.classes:
            if class_name(name) not in found:
                near = difflib.get_close_matches(name, self.problems.unknown_classes, 1)
                hint = f"did you mean {near[0]}?" if near else ""
                self.problems.add("class_without_object", name, hint)

    def index(self, root: Path, split: str) -> Index:
        """Return the index of everything added."""
        classes = self.classes or tuple(sorted(set(self.names)))
        number = {class_name(name): i for i, name in enumerate(classes)}
        truth = CocoTruth(
            boxes=np.array(self.stated, dtype=np.float64).reshape(-1, 4),
            areas=np.array(self.areas, dtype=np.float64),
            crowd=np.array(self.crowd, dtype=bool),
        )
        return Index(
            root=root,
            split=split,
            classes=classes,
            image_ids=self.image_ids,
            image_files=self.files,
            sizes=np.array(self.sizes, dtype=np.int32).reshape(-1, 2),
            exif_rotated=np.array(self.exif_rotated, dtype=bool),
            offsets=np.array(self.offsets, dtype=np.int64),
            boxes=np.array(self.clipped, dtype=np.float32).reshape(-1, 4),
            labels=np.array([number[name] for name in self.names], dtype=np.int64),
            difficult=np.array(self.difficult, dtype=bool),
            problems=self.problems,
            coco=truth if self.coco else None,
        )
