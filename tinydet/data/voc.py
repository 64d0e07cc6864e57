"""A split of a folder in VOC layout: the checked index of its annotations, and a Dataset over it.

The layout is `ImageSets/Main/<split>.txt` with a name a line, `Annotations/<name>.xml` and
`JPEGImages/<name>.jpg` (or .jpeg, .png, ...).
"""

from __future__ import annotations

import difflib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinydet.data.builder import IndexBuilder
from tinydet.data.image import IMAGE_SUFFIXES, read_image
from tinydet.data.index import (
    Index,
    cache_file,
    check_content,
    fingerprint,
    load_index,
    save_index,
)
from tinydet.data.sample import Sample
from tinydet.data.seeding import seeded_generator

logger = logging.getLogger(__name__)

_LAYOUT = "a folder in VOC layout holds Annotations/, ImageSets/Main/ and JPEGImages/"


class VocDataset(Dataset[Sample]):
    """The samples of an index; an image that cannot be decoded raises ValueError.

    Args:
        index: what `read_index` returned.
        transform: called with the sample and a generator seeded by the sample's number; the
            loaders of `tinydet.data.loader` call it with the epoch's generator instead.
    """

    def __init__(
        self, index: Index, transform: Callable[[Sample, torch.Generator], Sample] | None = None
    ) -> None:
        self.index = index
        self.classes = index.classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        sample = self.read(i)
        return self.transform(sample, seeded_generator(i)) if self.transform else sample

    def read(self, i: int) -> Sample:
        """Return sample `i` in its original size, without the transform."""
        return self.sample(i, read_image(self.index.image_path(i), bool(self.index.turned[i])))

    def sample(self, i: int, image: Tensor, reduction: int = 1) -> Sample:
        """Return sample `i` with its image, decoded already.

        Args:
            i: number of the image.
            image: (3, H, W) uint8 RGB as `read_image` returned it.
            reduction: of which the image was decoded at; boxes are divided by exactly that.
        """
        boxes, labels, difficult = self.index.objects(i)
        return Sample(
            image=image,
            # Copies: the index is shared by everyone who reads it.
            boxes=torch.tensor(boxes) / reduction,
            labels=torch.tensor(labels),
            difficult=torch.tensor(difficult),
            image_id=self.index.image_ids[i],
            size=self.index.size(i),
            scale=(1 / reduction, 1 / reduction),
        )


def read_index(root: str | Path, split: str, classes: Sequence[str] = ()) -> Index:
    """Read and check all annotations of a split; the result is cached until a file changes.

    Annotations are 1-based and inclusive: the pixels xmin to xmax become x in [xmin - 1, xmax].
    What the files get wrong is handled by the rules of `tinydet.data.problems` and counted in the
    index's `problems`.

    Args:
        root: folder in VOC layout.
        split: name of a file in `ImageSets/Main`, without .txt.
        classes: class names in label order; empty takes the names found, sorted.

    Raises:
        FileNotFoundError: the folder, one of its three parts or the split is missing.
        ValueError: no image is left, or none of the class names occurs.
    """
    root, classes = Path(root), tuple(classes)
    split_file = _check_layout(root, split)
    images = _image_names(root / "JPEGImages")
    names, repeated = _split_names(split_file, images)
    annotation_files = [root / "Annotations" / f"{name}.xml" for name in names]
    # Only files that the folder lists: a name with ".." in it must not lead elsewhere.
    image_files = [root / "JPEGImages" / images[name] if name in images else None for name in names]

    mark = fingerprint([split_file, *annotation_files, *filter(None, image_files)])
    cached = cache_file(root, split, classes)
    index = load_index(cached, mark, root, split)
    if index is None:
        logger.info("reading %d annotations of %s (%s)", len(names), root, split)
        builder = IndexBuilder(classes)
        for name in repeated:
            builder.problems.add("duplicate_id", name)
        for name, annotation_file, image_file in zip(
            names, annotation_files, image_files, strict=True
        ):
            builder.add_image(name, annotation_file, image_file)
        index = builder.index(root, split)
        save_index(index, cached, mark)
    check_content(index, split_file)
    return index


def split_names(root: str | Path) -> list[str]:
    """Return the names of the splits of a folder in VOC layout, sorted; empty if it has none."""
    return sorted(path.stem for path in (Path(root) / "ImageSets" / "Main").glob("*.txt"))


def _check_layout(root: Path, split: str) -> Path:
    """Return the split's file, or raise an error that names what is missing."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {_LAYOUT}")
    parts = ("Annotations", "ImageSets/Main", "JPEGImages")
    missing = [part for part in parts if not (root / part).is_dir()]
    if missing:
        below = sorted(path.parent for path in root.glob("**/Annotations"))[:1]
        hint = f"; did you mean {below[0]}?" if below and below[0] != root else f"; {_LAYOUT}"
        raise FileNotFoundError(f"{root}: has no {', '.join(missing)}{hint}")
    split_file = root / "ImageSets" / "Main" / f"{split}.txt"
    if not split_file.is_file():
        there = split_names(root)
        near = difflib.get_close_matches(split, there, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        listed = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
        raise FileNotFoundError(
            f"{split_file}: no such split{hint} (there are: {listed or 'none'}); choose with "
            "data.train_split and data.test_split"
        )
    return split_file


def _image_names(folder: Path) -> dict[str, str]:
    """Return name -> file name of the images in a folder."""
    rank = {suffix: i for i, suffix in enumerate(IMAGE_SUFFIXES)}
    found: dict[str, str] = {}
    for file in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(file)
        if suffix.lower() not in rank:
            continue
        # Two files of one name: the format that is listed first.
        if stem not in found or rank[suffix.lower()] < rank[Path(found[stem]).suffix.lower()]:
            found[stem] = file
    return found


def _split_names(path: Path, images: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the names in a split file, each once, and those listed more than once.

    Lines are a name, or as in VOC's files of one class a name and a flag -1, 0 or 1. An image with
    the flag -1 has no object of that class; as part of the split it counts all the same.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    names = []
    for line in filter(None, lines):
        name, _, flag = line.rpartition(" ")
        # A file name may hold a blank and end in a number: it comes before the flag form.
        if line not in images and name and flag in ("-1", "0", "1"):
            line = name.strip()
        stem, suffix = os.path.splitext(line)
        if line not in images and suffix.lower() in IMAGE_SUFFIXES:
            line = stem
        names.append(line)
    counts = Counter(names)
    return list(counts), [name for name, count in counts.items() if count > 1]
