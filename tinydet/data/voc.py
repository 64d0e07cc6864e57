"""A split of a folder in VOC layout: the checked index of its annotations, and a Dataset over it.

The layout is `ImageSets/Main/<split>.txt` with a name a line, `Annotations/<name>.xml` and
`JPEGImages/<name>.jpg` (or .jpeg, .png, ...).
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unicodedata import normalize

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
from tinydet.text import read_text

logger = logging.getLogger(__name__)

_LAYOUT = "a folder in VOC layout holds Annotations/, ImageSets/Main/ and JPEGImages/"
_FLAG = re.compile(r"\s+(-1|0|1)$")
# Of split files that are not UTF-8: what systems and consoles of our time write by default.
_OTHER_ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "cp850", "cp866"),
    *("gb18030", "cp932", "cp949", "cp950"),
)


class DetectionDataset(Dataset[Sample]):
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
        ValueError: the split's file is no text, no image is left, or no class name occurs.
    """
    root, classes = Path(root), tuple(classes)
    split_file = _check_layout(root, split)
    images = _files(root / "JPEGImages", IMAGE_SUFFIXES)
    annotations = _files(root / "Annotations", (".xml",))
    names, repeated = _split_names(split_file, images)
    # Only files that the folders list: a name with ".." in it must not lead elsewhere.
    image_files = [_file(name, images) for name in names]
    annotation_files = [_file(name, annotations) for name in names]

    found = [path for path in (*annotation_files, *image_files) if path is not None]
    mark = fingerprint([split_file, *found])
    cached = cache_file(root, split, classes)
    index = load_index(cached, mark, root, split)
    if index is None:
        logger.info("reading %d annotations of %s (%s)", len(names), root, split)
        builder = IndexBuilder(classes)
        for name in repeated:
            builder.problems.add("duplicate_id", name)
        others = _other_files(root / "JPEGImages") if None in image_files else {}
        for name, annotation_file, image_file in zip(
            names, annotation_files, image_files, strict=True
        ):
            if image_file is None:
                builder.problems.add("missing_image", name, others.get(name, ""))
            else:
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


def _files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the files with one of the suffixes by their names without it, as they are and in NFC.

    Of files of one name it is the one whose suffix comes first.
    """
    rank = {suffix: i for i, suffix in enumerate(suffixes)}
    found: dict[str, str] = {}
    for file in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(file)
        if suffix.lower() not in rank:
            continue
        if stem not in found or rank[suffix.lower()] < rank[Path(found[stem]).suffix.lower()]:
            found[stem] = file
    found = {normalize("NFC", stem): file for stem, file in found.items()} | found
    return {name: folder / file for name, file in found.items()}


def _file(name: str, files: dict[str, Path]) -> Path | None:
    return files.get(name) or files.get(normalize("NFC", name))


def _other_files(folder: Path) -> dict[str, str]:
    """Return what to say of the files that are not read, by their names without the suffix."""
    return {
        os.path.splitext(file)[0]: f"there is {file}, which is not read"
        for file in sorted(os.listdir(folder))
    }


def _split_names(path: Path, images: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Return the names in a split file, each once, and those listed more than once.

    Lines are a name, or as in VOC's files of one class a name and a flag -1, 0 or 1. An image with
    the flag -1 has no object of that class; as part of the split it counts all the same. Names may
    come with the image's suffix, and with the path of its folder.
    """
    lines = [line.strip() for line in _split_lines(path, images)]
    names = [_image_name(line, images) or _bare(line) for line in lines if line]
    counts = Counter(names)
    return list(counts), [name for name, count in counts.items() if count > 1]


def _split_lines(path: Path, images: dict[str, Path]) -> list[str]:
    """Return a split file's lines: as UTF-8, or in another encoding if only so its names exist."""
    for encoding in (None, *_OTHER_ENCODINGS):
        with contextlib.suppress(ValueError):
            text = path.read_bytes().decode(encoding) if encoding else read_text(path)
            lines = text.splitlines()
            if all(line.isascii() or _image_name(line.strip(), images) for line in lines):
                return lines
    return read_text(path).splitlines()


def _image_name(line: str, images: dict[str, Path]) -> str | None:
    """Return the name of the image that a line means, None if there is no such image."""
    # As it stands first: a file name may hold blanks, and end in a number.
    for text in (line, _FLAG.sub("", line)):
        for name in (text, _in_folder(text)):
            file = _file(name, images) or _file(_bare(name), images)
            if file is not None:
                return file.stem
    return None


def _in_folder(path: str) -> str:
    """Return a path without its folder if that is JPEGImages, or the current one."""
    folder, _, name = path.replace("\\", "/").rpartition("/")
    parts = [part for part in folder.split("/") if part != "."]
    is_ours = folder == "." or (parts[-1:] == ["JPEGImages"] and ".." not in parts)
    return name if is_ours else path


def _bare(line: str) -> str:
    """Return a line without flag and suffix."""
    stem, suffix = os.path.splitext(_FLAG.sub("", line))
    return stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix
