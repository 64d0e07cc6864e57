"""Index: the annotations of one split in a few flat arrays, and its file in the cache folder."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinydet.atomic import replacing
from tinydet.data.problems import Problems

logger = logging.getLogger(__name__)

# Increase it when rules or the layout of the file change: other versions are rebuilt.
_VERSION = 6
_ARRAYS = {
    "sizes": np.int32,
    "exif_rotated": np.bool_,
    "offsets": np.int64,
    "boxes": np.float32,
    "labels": np.int64,
    "difficult": np.bool_,
}


class Objects(NamedTuple):
    """The annotated objects of one image.

    Attributes:
        boxes: (N, 4) float32 xyxy, 0-based pixels of the original image, x in [0, W].
        labels: (N,) int64 class indices.
        difficult: (N,) bool.
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


class CocoTruth(NamedTuple):
    """What COCO's evaluation needs of each object, as stated in the annotation file.

    Attributes:
        boxes: (M, 4) float64 xyxy pixels, not clipped to the image.
        areas: (M,) float64 area of the object's mask in pixels; of its box if none is stated.
        crowd: (M,) bool; the box encloses many objects, and is left out of training.
    """

    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True, eq=False)
class Index:
    """One split of a data set. Objects of all images lie one after another in flat arrays.

    Attributes:
        root: the data set's folder.
        split: name of the split.
        classes: class names in label order.
        image_ids: names of the images.
        image_files: paths of the image files below `root`.
        sizes: (I, 2) int32 height and width of each image as `read_image` returns it.
        exif_rotated: (I,) bool; whether the image's EXIF orientation has to be applied.
        offsets: (I + 1,) int64; image i has the objects `offsets[i]:offsets[i + 1]`.
        boxes: (M, 4) float32 xyxy, 0-based pixels of the original image, x in [0, W].
        labels: (M,) int64 class indices.
        difficult: (M,) bool.
        problems: what was dropped, repaired or assumed.
        coco: more about the objects, if the data set has COCO's layout.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    image_ids: list[str]
    image_files: list[str]
    sizes: np.ndarray
    exif_rotated: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    problems: Problems
    coco: CocoTruth | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def objects(self, i: int) -> Objects:
        """Return the objects of image `i`, difficult ones included."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return Objects(self.boxes[part], self.labels[part], self.difficult[part])

    def coco_truth(self, i: int) -> CocoTruth | None:
        """Return what COCO's evaluation needs of the objects of image `i`."""
        if self.coco is None:
            return None
        part = slice(self.offsets[i], self.offsets[i + 1])
        return CocoTruth(*(values[part] for values in self.coco))

    def size(self, i: int) -> tuple[int, int]:
        """Return (height, width) of image `i` in pixels."""
        height, width = self.sizes[i]
        return int(height), int(width)

    def image_path(self, i: int) -> Path:
        """Return the path of image `i`'s file."""
        return self.root / self.image_files[i]


def cache_folder() -> Path:
    """Return the folder of cached indexes: `$TINYDET_CACHE`, else `~/.cache/tinydet`.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get("TINYDET_CACHE") or Path.home() / ".cache" / "tinydet")


def cache_file(root: Path, split: str, classes: tuple[str, ...]) -> Path:
    """Return the cache file of one split as read with these classes."""
    key = json.dumps([str(root.resolve()), split, list(classes)])
    return cache_folder() / f"index-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def fingerprint(paths: Iterable[Path]) -> str:
    """Return a hash of names, sizes and modification times of files."""
    digest = hashlib.sha256(f"version {_VERSION}\n".encode())
    for path in paths:
        try:
            stat = path.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{path.name} {state}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def save_index(index: Index, path: Path, mark: str) -> None:
    """Write the index to a cache file with the fingerprint `mark`; a failure is only logged."""
    header = {
        "fingerprint": mark,
        "classes": index.classes,
        "problems": index.problems.as_dict(),
        "image_ids": index.image_ids,
        "image_files": index.image_files,
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    if index.coco is not None:
        arrays |= {f"coco_{name}": values for name, values in index.coco._asdict().items()}
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    try:
        with replacing(path) as temporary:
            np.savez(temporary, header=text, **arrays)
    except OSError as error:
        logger.info("the index is not cached: %s", error)


def load_index(path: Path, mark: str, root: Path, split: str) -> Index | None:
    """Return the index in a cache file, or None if it is missing, damaged or out of date."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header["fingerprint"] != mark:
                return None
            arrays = {name: file[name] for name in _ARRAYS}
            coco = None
            if "coco_boxes" in file.files:
                coco = CocoTruth(*(file[f"coco_{name}"] for name in CocoTruth._fields))
        index = Index(
            root=root,
            split=split,
            classes=tuple(header["classes"]),
            image_ids=header["image_ids"],
            image_files=header["image_files"],
            problems=Problems(**header["problems"]),
            coco=coco,
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return index if _consistent(index) else None


def cached_index(
    root: Path,
    split: str,
    classes: tuple[str, ...],
    files: Sequence[Path],
    build: Callable[[], Index],
) -> Index:
    """Return a split's index from the cache, or build and cache it if a file has changed.

    Args:
        root: the data set's folder.
        split: name of the split.
        classes: class names in label order, or none.
        files: everything that the index depends on, first the file that lists the split.
        build: makes the index.

    Raises:
        ValueError: no image is left, or none of the class names occurs.
    """
    mark = fingerprint(files)
    try:
        cached = cache_file(root, split, classes)
    except RuntimeError as error:  # There is no home folder.
        logger.info("the index is not cached: %s", error)
        cached = None
    index = load_index(cached, mark, root, split) if cached else None
    if index is None:
        index = build()
        if cached:
            save_index(index, cached, mark)
    _check_content(index, files[0])
    return index


def no_such_split(
    file: Path, split: str, existing: Sequence[str], layout: str
) -> FileNotFoundError:
    """Return the error for a missing split file: it lists the splits and the nearest names."""
    near = difflib.get_close_matches(split, existing, 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return FileNotFoundError(
        f"{file}: no split {split}{hint} (there are: {_short(existing) or 'none'}); choose with "
        "data.train_split and data.test_split" + ("" if existing else f"; {layout}")
    )


def _check_content(index: Index, split_file: Path) -> None:
    """Refuse a split without any object.

    Raises:
        ValueError: no image is left, or none of the class names occurs.
    """
    if not len(index):
        lines = index.problems.summary()
        raise ValueError(f"{split_file}: no usable image" + (f": {lines[0]}" if lines else ""))
    if not len(index.labels):
        found = index.problems.unknown_classes
        if found:
            names = sorted(found, key=lambda name: -found[name])
            raise ValueError(
                f"{split_file}: none of the classes {_short(index.classes)} occurs; the "
                f"annotations have {_short(names)}: set data.classes to these, or leave it empty"
            )
        dropped = "; ".join(line for line in index.problems.summary() if "dropped" in line)
        raise ValueError(
            f"{split_file}: no annotated object in {len(index)} images"
            + (f": {dropped}" if dropped else "")
        )


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _consistent(index: Index) -> bool:
    """Whether the arrays of an index match: a cache file may be damaged."""
    n, m = len(index.image_ids), len(index.boxes)
    shapes = {
        "sizes": (n, 2),
        "exif_rotated": (n,),
        "offsets": (n + 1,),
        "boxes": (m, 4),
        "labels": (m,),
        "difficult": (m,),
    }
    return (
        len(index.image_files) == n
        and all(getattr(index, k).shape == shape for k, shape in shapes.items())
        and all(getattr(index, k).dtype == dtype for k, dtype in _ARRAYS.items())
        and index.offsets[-1] == m
        and (index.coco is None or [v.shape for v in index.coco] == [(m, 4), (m,), (m,)])
    )
