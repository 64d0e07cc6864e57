"""A split of a folder in VOC layout: the checked index of its annotations.

The layout is `ImageSets/Main/<split>.txt` with a name a line, `Annotations/<name>.xml` and
`JPEGImages/<name>.jpg` (or .jpeg, .png, ...).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

from tinydet.data.annotation import RawObject, parse_annotation
from tinydet.data.builder import FoundObject, IndexBuilder, check_image
from tinydet.data.image import IMAGE_SUFFIXES
from tinydet.data.index import Index, cached_index, no_such_split
from tinydet.progress import Progress
from tinydet.text import read_text

logger = logging.getLogger(__name__)

_LAYOUT = "a folder in VOC layout holds Annotations/, ImageSets/Main/ and JPEGImages/"
# In 1-based inclusive pixels this is a box of one pixel: in practice a stray click.
SMALLEST = 1.0
_FLAG = re.compile(r"\s+(-1|0|1)$")
# Of split files that are not UTF-8: common defaults of systems and consoles.
_OTHER_ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "cp850", "cp866"),
    *("gb18030", "cp932", "cp949", "cp950"),
)


def read_index(root: str | Path, split: str, classes: Sequence[str] = ()) -> Index:
    """Read and check all annotations of a split; the result is cached until a file changes.

    Annotations are 1-based and inclusive: the pixels xmin to xmax become x in [xmin - 1, xmax].
    Problems of the files are handled by the rules of `tinydet.data.problems` and counted in the
    index's `problems`.

    Args:
        root: folder in VOC layout.
        split: name of a file in `ImageSets/Main`, without .txt.
        classes: class names in label order; empty takes the names found, sorted.

    Raises:
        FileNotFoundError: the folder, one of its three parts or the split is missing.
        ValueError: the split's file is no text, no image is left, or none of the classes occurs.
    """
    root, classes = Path(root), tuple(classes)
    split_file = _check_layout(root, split)
    images = _files(root / "JPEGImages", IMAGE_SUFFIXES)
    annotations = _files(root / "Annotations", (".xml",))
    names, repeated = _split_names(split_file, images)
    # Only files of these folders: a name with ".." must not lead outside.
    image_files = [_file(name, images) for name in names]
    annotation_files = [_file(name, annotations) for name in names]

    found = [path for path in (*annotation_files, *image_files) if path is not None]

    def build() -> Index:
        logger.info("reading %d annotations of %s (%s)", len(names), root, split)
        builder = IndexBuilder(classes, SMALLEST)
        for name in repeated:
            builder.problems.add("duplicate_id", name)
        others = _other_files(root / "JPEGImages") if None in image_files else {}
        with Progress("reading annotations", len(names), "images") as progress:
            for name, annotation_file, image_file in zip(
                names, annotation_files, image_files, strict=True
            ):
                if image_file is None:
                    builder.problems.add("missing_image", name, others.get(name, ""))
                else:
                    _add_image(builder, name, annotation_file, image_file)
                progress.advance()
        builder.check_classes()
        return builder.index(root, split)

    return cached_index(root, split, classes, [split_file, *found], build)


def _add_image(
    builder: IndexBuilder, name: str, annotation_file: Path | None, image_file: Path
) -> None:
    """Check one image and its annotation, and add what is usable."""
    if annotation_file is None:
        builder.problems.add("missing_annotation", name)
        return
    try:
        annotation = parse_annotation(annotation_file)
    except (ValueError, OSError) as error:
        builder.problems.add("bad_annotation", name, str(error))
        return
    checked = check_image(name, image_file, annotation.size, builder.problems)
    if checked is not None:
        objects = map(_found, annotation.objects)
        builder.add_image(name, f"JPEGImages/{image_file.name}", checked, objects)


def _found(item: RawObject) -> FoundObject:
    if item.box is None:
        return FoundObject(item.name, None)
    xmin, ymin, xmax, ymax = item.box
    text = f"{xmin:g},{ymin:g},{xmax:g},{ymax:g}"
    return FoundObject(
        item.name, (xmin - 1, ymin - 1, xmax, ymax), text, {"difficult": item.difficult}
    )


def split_names(root: str | Path) -> list[str]:
    """Return the names of the splits of a folder in VOC layout, sorted; empty if it has none.

    VOC's lists of one class (cat_train beside train, with a flag behind each name) are no splits,
    but are read as such by their names.
    """
    files = {path.stem: path for path in (Path(root) / "ImageSets" / "Main").glob("*.txt")}
    return sorted(
        name
        for name, path in files.items()
        if name.rpartition("_")[2] not in files.keys() - {name} or not _is_flagged(path)
    )


def _is_flagged(path: Path) -> bool:
    lines = path.read_text("latin-1").splitlines()  # of any encoding: names are not looked at
    return all(_FLAG.search(line.rstrip()) for line in lines if line.strip())


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
        raise no_such_split(split_file, split, split_names(root), _LAYOUT)
    return split_file


def _files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the files with one of the suffixes by their names without it, as written and in NFC.

    Of files with equal names, the one whose suffix is listed first is used.
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
    """Return hints at files that are not read, by their names without the suffix."""
    return {
        os.path.splitext(file)[0]: f"there is {file}, which is not read"
        for file in sorted(os.listdir(folder))
    }


def _split_names(path: Path, images: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Return the names in a split file, each once, and those listed more than once.

    A line is a name, or as in VOC's files of one class a name and a flag -1, 0 or 1. The flag -1
    means that the image has no object of that class; it is part of the split all the same. Names
    may have the image's suffix and the path of its folder.
    """
    lines = [line.strip() for line in _split_lines(path, images)]
    names = [_image_name(line, images) or _bare(line) for line in lines if line]
    counts = Counter(names)
    return list(counts), [name for name, count in counts.items() if count > 1]


def _split_lines(path: Path, images: dict[str, Path]) -> list[str]:
    """Return a split file's lines: as UTF-8, or in an encoding in which its names exist."""
    for encoding in (None, *_OTHER_ENCODINGS):
        with contextlib.suppress(ValueError):
            text = path.read_bytes().decode(encoding) if encoding else read_text(path)
            lines = text.splitlines()
            if all(line.isascii() or _image_name(line.strip(), images) for line in lines):
                return lines
    return read_text(path).splitlines()


def _image_name(line: str, images: dict[str, Path]) -> str | None:
    """Return the name of the image of a line, None if there is no such image."""
    # As written first: a file name may have blanks, and end in a number.
    for text in (line, _FLAG.sub("", line)):
        for name in (text, _in_folder(text)):
            file = _file(name, images) or _file(_bare(name), images)
            if file is not None:
                return file.stem
    return None


def _in_folder(path: str) -> str:
    """Return a path without its folder if that is JPEGImages or "."."""
    folder, _, name = path.replace("\\", "/").rpartition("/")
    parts = [part for part in folder.split("/") if part != "."]
    is_ours = folder == "." or (parts[-1:] == ["JPEGImages"] and ".." not in parts)
    return name if is_ours else path


def _bare(line: str) -> str:
    """Return a line without flag and suffix."""
    stem, suffix = os.path.splitext(_FLAG.sub("", line))
    return stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix
