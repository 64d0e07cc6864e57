"""Checks images and their VOC annotations, and builds the index of what is usable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinydet.data.annotation import RawObject, class_name, parse_annotation, parse_flag
from tinydet.data.image import ImageInfo, probe_image
from tinydet.data.index import Index
from tinydet.data.problems import Problems


@dataclass
class _Image:
    """A checked image of the index, with class names still as text."""

    name: str
    file: str
    size: tuple[int, int]
    exif_rotated: bool
    boxes: list[tuple[float, float, float, float]]
    names: list[str]
    difficult: list[bool]


def check_image(
    name: str, path: Path, stated: tuple[int, int] | None, problems: Problems
) -> tuple[tuple[int, int], bool] | None:
    """Check an image file, and count its problems.

    Args:
        name: what `problems` calls the image.
        path: the file.
        stated: (height, width) that the annotation states; None if it states none.
        problems: added to.

    Returns:
        The (height, width) that the boxes refer to, and whether the EXIF orientation has to be
        applied; None if the image cannot be read.
    """
    try:
        info = probe_image(path)
    except (ValueError, OSError) as error:
        problems.add("bad_image", name, str(error).removeprefix(f"{path}: "))
        return None
    if info.mode != "RGB":
        problems.add("not_rgb", name, info.mode)
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


class IndexBuilder:
    """Collects checked images and counts problems.

    Args:
        classes: class names in label order; empty takes the names found, sorted.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.problems = Problems()
        self.classes = classes
        self.known = set(map(class_name, classes))
        self.images: list[_Image] = []

    def add_image(self, name: str, annotation_file: Path | None, image_file: Path) -> None:
        """Check one image and its annotation, and add what is usable."""
        if annotation_file is None:
            self.problems.add("missing_annotation", name)
            return
        try:
            annotation = parse_annotation(annotation_file)
        except (ValueError, OSError) as error:
            self.problems.add("bad_annotation", name, str(error))
            return
        checked = check_image(name, image_file, annotation.size, self.problems)
        if checked is None:
            return
        size, exif_rotated = checked
        file = f"JPEGImages/{image_file.name}"
        image = _Image(name, file, size, exif_rotated, boxes=[], names=[], difficult=[])
        for item in annotation.objects:
            item.name = class_name(item.name)
            box = self._check_object(name, item, size)
            if box is not None:
                image.boxes.append(box)
                image.names.append(item.name)
                image.difficult.append(self._difficult(name, item))
        self.images.append(image)

    def _difficult(self, name: str, item: RawObject) -> bool:
        difficult = parse_flag(item.difficult)
        if difficult is None:
            self.problems.add("unclear_mark", name, f"{item.name}, difficult is {item.difficult!r}")
        return bool(difficult)

    def _check_object(
        self, name: str, item: RawObject, size: tuple[int, int]
    ) -> tuple[float, float, float, float] | None:
        """Return the object's box, 0-based and inside the image, or None if it is dropped."""
        if not item.name:
            self.problems.add("no_class_name", name)
            return None
        if item.box is None:
            self.problems.add("bad_box", name, item.name)
            return None
        xmin, ymin, xmax, ymax = item.box
        what = f"{item.name} {xmin:g},{ymin:g},{xmax:g},{ymax:g}"
        # In 1-based inclusive pixels this is a box of one pixel: in practice a stray click.
        if xmax <= xmin or ymax <= ymin:
            self.problems.add("zero_area", name, what)
            return None
        if self.classes and item.name not in self.known:
            self.problems.add("unknown_class", name, item.name)
            counts = self.problems.unknown_classes
            counts[item.name] = counts.get(item.name, 0) + 1
            return None
        height, width = size
        box = (xmin - 1, ymin - 1, xmax, ymax)
        clipped = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            self.problems.add("outside", name, f"{what} in {width}x{height}")
            return None
        if clipped != box:
            self.problems.add("clipped", name, f"{what} in {width}x{height}")
        return clipped

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
