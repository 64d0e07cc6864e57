"""A split of a folder in COCO layout: the checked index of its annotations.

The layout is `annotations/instances_<split>.json` and the images in `<split>/`. COCO's category ids
(1 to 90, with holes) become labels 0, 1, ... in the order of the ids. Boxes x, y, width, height are
continuous and 0-based, and need no shift as VOC's do.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard
from unicodedata import normalize

from pycocotools.coco import COCO

from tinydet.data.annotation import class_name
from tinydet.data.builder import FoundObject, IndexBuilder, check_image, check_names
from tinydet.data.image import files_below
from tinydet.data.index import Index, cached_index, no_such_split
from tinydet.progress import Progress
from tinydet.text import read_text

logger = logging.getLogger(__name__)

WHAT_TO_FETCH = (
    "COCO 2017 is zips/train2017.zip, zips/val2017.zip and annotations/"
    "annotations_trainval2017.zip of http://images.cocodataset.org, unpacked in data.root"
)
_LAYOUT = "a folder in COCO layout holds annotations/instances_<split>.json and <split>/"
_LARGEST = 1e15


def read_index(root: str | Path, split: str, classes: Sequence[str] = ()) -> Index:
    """Read and check the annotations of a split; the result is cached until a file changes.

    Problems of the files are handled by the rules of `tinydet.data.problems` and counted in the
    index's `problems`. Images are in the order of their ids, including those without objects.
    Crowds and objects marked `ignore` are difficult, and so left out of training. With the index's
    `coco`, the COCO metric equals that of pycocotools on the file itself, unless boxes were dropped
    (they are not evaluated either) or marked `ignore` (which pycocotools does not read).

    Args:
        root: folder in COCO layout.
        split: name of the split, e.g. "train2017".
        classes: class names in label order, objects of others are dropped; empty takes all of the
            file's categories in the order of their ids.

    Raises:
        FileNotFoundError: the folder, the annotation file or the folder of images is missing.
        ValueError: the annotation file cannot be read, no image is left, or none of the class names
            occurs.
    """
    root, classes = Path(root), tuple(classes)
    annotation_file = _check_layout(root, split)
    files = files_below(root / split)

    def build() -> Index:
        logger.info("reading %s", annotation_file)
        return _Reader(root, split, _read_json(annotation_file), files, classes).index()

    paths = [annotation_file, *(root / split / file for file in files)]
    return cached_index(root, split, classes, paths, build)


def split_names(root: str | Path) -> list[str]:
    """Return the names of the splits of a folder in COCO layout, sorted; empty if it has none."""
    files = (Path(root) / "annotations").glob("instances_*.json")
    return sorted(path.stem.removeprefix("instances_") for path in files)


def _check_layout(root: Path, split: str) -> Path:
    """Return the split's annotation file, or raise an error that names what is missing."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {_LAYOUT}; {WHAT_TO_FETCH}")
    if not (root / "annotations").is_dir():
        below = sorted(path.parent for path in root.glob("*/annotations"))[:1]
        hint = f"did you mean {below[0]}?" if below else f"{_LAYOUT}; {WHAT_TO_FETCH}"
        raise FileNotFoundError(f"{root}: has no annotations; {hint}")
    file = root / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        raise no_such_split(file, split, split_names(root), WHAT_TO_FETCH)
    if not (root / split).is_dir():
        raise FileNotFoundError(
            f"{root / split}: no such folder; it holds the images of {file.name}; {WHAT_TO_FETCH}"
        )
    return file


def _read_json(file: Path) -> COCO:
    """Read an annotation file without the objects' outlines, nine tenths of its size.

    Raises:
        ValueError: the file is not text or not JSON, or not a detection set of COCO's format.
    """

    def without_outline(row: dict[str, Any]) -> dict[str, Any]:
        row.pop("segmentation", None)
        return row

    coco = COCO()
    text = read_text(file)
    try:
        coco.dataset = json.loads(text, object_hook=without_outline)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    for part in ("images", "annotations", "categories"):
        rows = coco.dataset.get(part) if isinstance(coco.dataset, dict) else None
        if not isinstance(rows, list):
            raise ValueError(
                f'{file}: has no list "{part}"; a detection set of COCO\'s format has images, '
                "annotations and categories"
            )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    except (KeyError, TypeError, IndexError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
        raise ValueError(f"{file}: an entry of images, annotations or categories {what}") from None
    for part, numbers in (("image", coco.imgs), ("category", coco.cats)):
        wrong = [number for number in numbers if type(number) is not int]
        if wrong:
            raise ValueError(f"{file}: the {part} id {wrong[0]!r} is not a whole number")
    if len(coco.cats) < len(coco.dataset["categories"]):
        raise ValueError(f"{file}: two categories have the same id")
    return coco


class _Reader:
    """Finds the images and objects of one annotation file, and puts them into an index."""

    def __init__(
        self, root: Path, split: str, coco: COCO, files: list[str], classes: tuple[str, ...]
    ) -> None:
        self.root, self.split, self.coco = root, split, coco
        self.files = {_plain(file): file for file in files} | {file: file for file in files}
        self.names = {number: _name(coco.cats[number]) for number in sorted(coco.cats)}
        known = tuple(dict.fromkeys(filter(None, self.names.values())))
        self.builder = IndexBuilder(classes or known, coco=True)
        self.problems = self.builder.problems

    def index(self) -> Index:
        """Return the index of everything usable."""
        check_names(self.names, self.builder.classes, self.problems)
        for number in self.coco.imgToAnns.keys() - self.coco.imgs.keys():
            for item in self.coco.imgToAnns[number]:
                self.problems.add("unknown_image", f"object {item['id']}", f"image {number!r}")
        with Progress("checking images", len(self.coco.imgs), "images") as progress:
            for file, row in self._image_rows():
                progress.advance()
                stated = _stated_size(row)
                checked = check_image(file, self.root / self.split / file, stated, self.problems)
                if checked is not None:
                    objects = self._objects(file, self.coco.imgToAnns.get(row["id"], ()))
                    place = f"{self.split}/{file}"
                    self.builder.add_image(file, place, checked, objects, str(row["id"]))
        return self.builder.index(self.root, self.split)

    def _image_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the file's images and their image files, each once, by ascending id."""
        seen_ids, seen_files = set(), set()
        # COCOeval's order too, which decides between equal scores.
        for row in sorted(self.coco.dataset["images"], key=lambda row: row["id"]):
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                self.problems.add("no_file_name", f"image {row['id']}")
                continue
            # Only files of the folder: a name with ".." must not lead outside.
            file = self._file(name)
            if row["id"] in seen_ids or (file or name) in seen_files:
                self.problems.add("duplicate_id", name, f"image {row['id']}")
                if row["id"] not in seen_ids:  # Its objects are those of no other image.
                    for item in self.coco.imgToAnns.get(row["id"], ()):
                        self.problems.add("duplicate_objects", name, f"object {item['id']}")
            elif file is None:
                self.problems.add("missing_image", f"{self.split}/{name}", self._beside(name))
            else:
                yield file, row
            seen_ids.add(row["id"])
            seen_files.add(file or name)

    def _file(self, name: str) -> str | None:
        """Return the file below the split's folder for a name, perhaps with a path."""
        if name in self.files:
            return self.files[name]
        parts = _plain(name).split("/")
        while "/".join(parts) not in self.files and self.split in parts[:-1] and ".." not in parts:
            parts = parts[parts.index(self.split) + 1 :]
        return self.files.get("/".join(parts))

    def _beside(self, name: str) -> str:
        """Return a hint at a file with the same name but for its folder and suffix."""
        other = self._by_stem.get(Path(_plain(name)).stem)
        return f"there is {self.split}/{other}" if other else ""

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        return {Path(file).stem: file for file in self.files.values()}

    def _objects(self, file: str, items: Iterable[dict[str, Any]]) -> Iterator[FoundObject]:
        """Yield an image's objects of known categories."""
        for item in items:
            category, box, area = item["category_id"], item.get("bbox"), item.get("area")
            name = self.names.get(category)
            if name is None:
                self.problems.add("unknown_category", file, f"{category!r}")
            elif isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
                x, y, width, height = map(float, box)
                text = f"{x:g},{y:g},{width:g},{height:g}" if name else f"category {category}"
                marks = {key: item.get(key) for key in ("iscrowd", "ignore")}
                area = area if _is_number(area) else None
                yield FoundObject(name, (x, y, x + width, y + height), text, marks, area)
            else:
                yield FoundObject(name, None, f"object {item['id']}")


def _name(category: dict[str, Any]) -> str:
    name = category.get("name")
    return class_name(str(name)) if isinstance(name, (str, int)) else ""


def _plain(path: str) -> str:
    """Return a path in the form used for comparison: NFC, slashes, suffix in lower case."""
    path = normalize("NFC", path).replace("\\", "/").removeprefix("./")
    stem, suffix = os.path.splitext(path)
    return stem + suffix.lower()


def _stated_size(row: dict[str, Any]) -> tuple[int, int] | None:
    height, width = row.get("height"), row.get("width")
    return (int(height), int(width)) if _is_number(height) and _is_number(width) else None


def _is_number(value: Any) -> TypeGuard[float]:
    # Not NaN, which compares as false, and not too large for a float.
    return isinstance(value, (int, float)) and abs(value) < _LARGEST
