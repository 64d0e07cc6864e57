"""A split of a folder in YOLO layout: the checked index of its annotations.

The layout is that of Ultralytics and Roboflow: `data.yaml` names the classes and, for each split, a
folder of images or a list of them; the labels of `.../images/a.jpg` are in `.../labels/a.txt`. A
line is a class number and a box (centre, width, height) or a polygon, as fractions of the image
as viewers show it, turned by its EXIF orientation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tinydet.data.annotation import class_name
from tinydet.data.builder import Box, FoundObject, IndexBuilder, check_image, check_names
from tinydet.data.image import IMAGE_SUFFIXES, files_below
from tinydet.data.index import Index, cached_index, no_such_split
from tinydet.progress import Progress
from tinydet.text import read_text

logger = logging.getLogger(__name__)

_LAYOUT = "a folder in YOLO layout holds data.yaml, and folders images/ and labels/"
_NO_SPLITS = ("path", "names", "download")  # other fields that are text or lists
# Fractions are rounded to six or fewer digits: this far outside 0 to 1 they are clipped.
_ROUNDING = 0.01


class _TextLoader(yaml.SafeLoader):
    """Reads words as they are written: a class may be called yes, 1.50 or 2024-01-01."""

    yaml_implicit_resolvers = {  # noqa: RUF012, pyyaml's name
        first: [(tag, form) for tag, form in found if tag.endswith((":null", ":merge"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_index(root: str | Path, split: str, classes: Sequence[str] = ()) -> Index:
    """Read and check all labels of a split; the result is cached until a file changes.

    Problems of the files are handled by the rules of `tinydet.data.problems` and counted in the
    index's `problems`. An image without a label file has no objects, as in Ultralytics.

    Args:
        root: folder in YOLO layout.
        split: "train", "val" or "test", as in `data.yaml`.
        classes: class names in label order, objects of others are dropped; empty takes those of
            `data.yaml` in the order of their numbers.

    Raises:
        FileNotFoundError: the folder, `data.yaml`, the split or its images are missing.
        ValueError: `data.yaml` or a list cannot be read, no image is left, or none of the class
            names occurs.
    """
    root, classes = Path(root), tuple(classes)
    yaml_file, content = _read_yaml(root)
    names = _class_names(yaml_file, content)
    if not _is_split(content, split):
        raise no_such_split(yaml_file, split, split_names(root), _LAYOUT)
    images, listed = _images(root, yaml_file, content, split)
    labels = [_label_file(image) for image in images]
    boxes_only = "kpt_shape" in content  # Of poses, only the box in front is read.

    def build() -> Index:
        logger.info("reading the labels of %d images of %s (%s)", len(images), root, split)
        builder = IndexBuilder(classes or tuple(dict.fromkeys(names.values())))
        check_names(names, classes, builder.problems)
        taken: dict[Path, Path] = {}
        with Progress("reading labels", len(images), "images") as progress:
            for image, label in zip(images, labels, strict=True):
                if image.is_file() and taken.setdefault(label, image) != image:
                    name = _image_id(root, image)
                    builder.problems.add("same_labels", name, f"{image.name}, {taken[label].name}")
                else:
                    _add_image(builder, root, image, label, names, boxes_only)
                progress.advance()
        return builder.index(root, split)

    found = [path for path in (*listed, *labels, *images) if path.is_file()]
    return cached_index(root, split, classes, [yaml_file, *found], build)


def split_names(root: str | Path) -> list[str]:
    """Return the names of the splits in a folder's `data.yaml` whose images are there."""
    root = Path(root)
    content = _read_yaml(root)[1]
    base = content.get("path")
    return [
        str(name)
        for name in content
        if _is_split(content, name)
        and all(_resolve(root, base, place) for place in _places(content, name))
    ]


def _is_split(content: dict[str, Any], name: str) -> bool:
    return name not in _NO_SPLITS and bool(_places(content, name))


def _places(content: dict[str, Any], name: str) -> list[str]:
    given = content.get(name)
    places = given if isinstance(given, list) else [given]
    return [place for place in places if isinstance(place, str) and place]


def _add_image(
    builder: IndexBuilder,
    root: Path,
    image: Path,
    label: Path,
    names: dict[int, str],
    boxes_only: bool,
) -> None:
    """Check one image and its labels, and add what is usable."""
    name, problems = _image_id(root, image), builder.problems
    if not image.is_file():
        problems.add("missing_image", name)
        return
    try:
        lines = read_text(label).splitlines() if label.is_file() else None
    except (ValueError, OSError) as error:
        problems.add("bad_annotation", name, str(error).removeprefix(f"{label}: "))
        return
    checked = check_image(name, image, None, problems, as_viewed=True)
    if checked is None:
        return
    if lines is None:
        problems.add("no_labels", name)
    (height, width), _ = checked
    objects = []
    for line in filter(str.strip, lines or []):
        number, *fields = line.split()
        if _number(number) not in names:
            problems.add("unknown_category", name, f"class {number}")
            continue
        box = _box([_float(field) for field in fields], boxes_only)
        if box is not None:
            box = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        objects.append(FoundObject(names[_number(number)], box, ",".join(fields[:8])))
    builder.add_image(name, _below(root, image), checked, objects)


def _read_yaml(root: Path) -> tuple[Path, dict[str, Any]]:
    """Return `data.yaml`, or the only such file of another name, and its content."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {_LAYOUT}")
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in (".yaml", ".yml"))
    files = [path for path in files if path.stem.lower() == "data"][:1] or files
    if len(files) != 1:
        below = sorted(path.parent for path in root.glob("*/data.y*ml"))[:1]
        hint = f"; did you mean {below[0]}?" if below else f"; {_LAYOUT}"
        raise FileNotFoundError(f"{root}: has no data.yaml{hint}")
    try:
        content = yaml.load(read_text(files[0]), Loader=_TextLoader)
    except (yaml.YAMLError, RecursionError) as error:
        first_line = " ".join(str(error).split())[:200]
        raise ValueError(f"{files[0]}: not YAML ({first_line})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{files[0]}: has no fields such as train, val and names")
    return files[0], content


def _class_names(file: Path, content: dict[str, Any]) -> dict[int, str]:
    """Return the class names by number, ascending; without names, as many numbers as `nc` says."""
    names, number = content.get("names"), _number(str(content.get("nc")))
    if isinstance(names, list):
        names = dict(enumerate(names))
    if names is None and 0 < number < 100_000:
        names = {i: f"class {i}" for i in range(number)}
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{file}: has no names, a list or a map from numbers to class names")
    found = {}
    for key, name in names.items():
        text = class_name(name) if isinstance(name, str) else ""
        if not str(key).isdecimal() or not text:
            raise ValueError(f"{file}: names has {key!r}: {name!r}; give a number and a name")
        found[int(key)] = text
    return dict(sorted(found.items()))


def _images(
    root: Path, file: Path, content: dict[str, Any], split: str
) -> tuple[list[Path], list[Path]]:
    """Return the images of a split, each once, and the lists that name them."""
    images: list[Path] = []
    lists: list[Path] = []
    for place in _places(content, split):
        path = _resolve(root, content.get("path"), place)
        if path is None:
            raise FileNotFoundError(f"{file}: {split} is {place}, which is not below {root}")
        if path.is_dir():
            files = [path / file for file in files_below(path)]
            images += [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        else:
            lists.append(path)
            lines = (line.strip() for line in read_text(path).splitlines())
            images += [_listed(root, path, line) for line in lines if line]
    return list(dict.fromkeys(images)), lists


def _resolve(root: Path, base: Any, place: str) -> Path | None:
    """Return the file or folder that an entry of `data.yaml` means.

    `path` is often that of the machine that wrote the file, and Roboflow's entries start with a
    `../` too many: places below the folder of `data.yaml` are tried first.
    """
    place = place.replace("\\", "/")
    candidates = [root / place.removeprefix("../"), root / place]
    if base:
        candidates += [root / str(base) / place, Path(str(base)) / place]
    return next((path for path in candidates if path.exists()), None)


def _listed(root: Path, file: Path, line: str) -> Path:
    """Return the image of a line: relative to the list's folder ("./"), or to the data set's."""
    line = line.replace("\\", "/")
    candidates = [file.parent / line, root / line]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _label_file(image: Path) -> Path:
    """Return the label file: the last folder `images` of the path becomes `labels`."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _below(root: Path, image: Path) -> str:
    return image.relative_to(root).as_posix() if image.is_relative_to(root) else str(image)


def _image_id(root: Path, image: Path) -> str:
    """Return a name without suffix, and with the folders below `images`, unique in the split."""
    return Path(_below(root, image)).with_suffix("").as_posix()


def _box(values: list[float], boxes_only: bool) -> Box | None:
    """Return (x1, y1, x2, y2) of a box or a polygon, as fractions; None if it is neither."""
    if boxes_only:
        values = values[:4]
    # Not fractions: percent or pixels, which must not be guessed. NaN is not within either.
    if not values or not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in values):
        return None
    if len(values) == 4:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(values) < 6 or len(values) % 2:
        return None
    xs, ys = values[::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _number(text: str) -> int:
    """Return a class number, also one written as "3.0"; -1 if it is none."""
    value = _float(text)
    return int(value) if value.is_integer() else -1


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
