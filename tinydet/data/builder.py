"""Checks images and their objects, and builds the index of what is usable."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinydet.data.annotation import class_name, parse_flag
from tinydet.data.image import ImageInfo, probe_image
from tinydet.data.index import Index
from tinydet.data.problems import Problems

# Coordinates are often rounded: a box may be this many pixels outside its image without a word.
_ROUNDING = 0.02

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class FoundObject:
    """An object as its annotation has it.

    Attributes:
        name: class name.
        box: (x1, y1, x2, y2) in continuous, 0-based pixels; None if it cannot be read.
        text: the box as the file states it, for messages.
        difficult: mark of being hard to recognise, for `parse_flag`.
    """

    name: str
    box: Box | None
    text: str = ""
    difficult: object = None


@dataclass
class _Image:
    """A checked image of the index, with class names still as text."""

    name: str
    file: str
    size: tuple[int, int]
    exif_rotated: bool
    boxes: list[Box]
    names: list[str]
    difficult: list[bool]


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
    """Collects checked images and counts problems.

    Args:
        classes: class names in label order; empty takes the names found, sorted.
        smallest: sides of a box, in pixels, that are too small to have an area.
    """

    def __init__(self, classes: tuple[str, ...], smallest: float) -> None:
        self.problems = Problems()
        self.classes = classes
        self.smallest = smallest
        self.known = set(map(class_name, classes))
        self.images: list[_Image] = []

    def add_image(
        self,
        name: str,
        file: str,
        checked: tuple[tuple[int, int], bool],
        objects: Iterable[FoundObject],
    ) -> None:
        """Add an image and those of its objects that are usable.

        Args:
            name: of the image.
            file: its path below the data set's folder.
            checked: what `check_image` returned.
            objects: in the annotation's order.
        """
        image = _Image(name, file, *checked, boxes=[], names=[], difficult=[])
        for item in objects:
            label = class_name(item.name)
            box = self._check_object(name, label, item, image.size)
            if box is None:
                continue
            difficult = parse_flag(item.difficult)
            if difficult is None:
                what = f"{label}, difficult is {item.difficult!r}"
                self.problems.add("unclear_mark", name, what)
            image.boxes.append(box)
            image.names.append(label)
            image.difficult.append(bool(difficult))
        self.images.append(image)

    def _check_object(
        self, name: str, label: str, item: FoundObject, size: tuple[int, int]
    ) -> Box | None:
        """Return the object's box inside the image, or None if it is dropped."""
        if not label:
            self.problems.add("no_class_name", name)
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
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            self.problems.add("outside", name, f"{what} in {width}x{height}")
            return None
        if max(abs(a - b) for a, b in zip(clipped, item.box, strict=True)) > _ROUNDING:
            self.problems.add("clipped", name, f"{what} in {width}x{height}")
        return clipped

    def check_classes(self) -> None:
        """Count classes that were asked for and have no object, where no list of classes tells."""
        found = {name for image in self.images for name in image.names}
        for name in self.classes:
            if class_name(name) not in found:
                near = difflib.get_close_matches(name, self.problems.unknown_classes, 1)
                hint = f"did you mean {near[0]}?" if near else ""
                self.problems.add("class_without_object", name, hint)

    def index(self, root: Path, split: str) -> Index:
        """Return the index of everything added."""
        names = [name for image in self.images for name in image.names]
        classes = self.classes or tuple(sorted(set(names)))
        number = {class_name(name): i for i, name in enumerate(classes)}
        counts = [len(image.boxes) for image in self.images]
        boxes = [box for image in self.images for box in image.boxes]
        return Index(
            root=root,
            split=split,
            classes=classes,
            image_ids=[image.name for image in self.images],
            image_files=[image.file for image in self.images],
            sizes=np.array([i.size for i in self.images], dtype=np.int32).reshape(-1, 2),
            exif_rotated=np.array([image.exif_rotated for image in self.images], dtype=bool),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            labels=np.array([number[name] for name in names], dtype=np.int64),
            difficult=np.array([d for i in self.images for d in i.difficult], dtype=bool),
            problems=self.problems,
        )
