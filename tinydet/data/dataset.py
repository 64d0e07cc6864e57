"""From an experiment's `data` to an index: makes the data present, then reads it."""

from __future__ import annotations

import logging
from pathlib import Path

from tinydet.config import ConfigError, Data
from tinydet.data import coco, voc
from tinydet.data.index import Index

logger = logging.getLogger(__name__)


def is_missing(data: Data) -> bool:
    """Whether the data's folder is not there, is empty, or is half of VOC 2007's download."""
    root = Path(data.root)
    if not root.is_dir() or not any(root.iterdir()):
        return True
    if data.source != "voc07":
        return False
    # Only VOC's own splits: a misspelt name is no reason to download.
    wanted = {data.train_split, data.test_split} & {"train", "val", "trainval", "test"}
    return not wanted <= set(voc.split_names(root))


def fetch(data: Data) -> None:
    """Make missing data present: download VOC 2007, or render the synthetic set.

    Raises:
        FileNotFoundError: the source is "folder" or "coco": nothing is fetched for these.
        tinydet.data.download.DownloadError: the download failed; the message says what to do.
        ValueError: `data.root` is not where the download unpacks to.
    """
    root = Path(data.root)
    if data.source == "shapes":
        from tinydet.data.shapes import render_shapes

        logger.info("rendering the synthetic data set into %s", root)
        render_shapes(root)
    elif data.source == "voc07":
        from tinydet.data.download import download_voc07

        if root.parts[-2:] != ("VOCdevkit", "VOC2007"):
            raise ValueError(
                f"data.root={root}: the VOC 2007 archives unpack to VOCdevkit/VOC2007; "
                "let data.root end in that"
            )
        download_voc07(root.parent.parent)
    else:
        raise FileNotFoundError(_missing(data))


def load_split(data: Data, split: str) -> Index:
    """Read one split; the synthetic set is rendered first where it is missing.

    What the index's checks found is logged as warnings, one line a rule. Without `data.classes`
    the class names are those of the training split, whatever split is read: labels of all splits
    have to mean the same.

    Args:
        data: the experiment's data.
        split: name of the split, e.g. `data.train_split`.

    Raises:
        FileNotFoundError: the folder or the split is missing; the message says what to do.
        ConfigError: `data.classes` names a class that COCO's file of the training split lacks.
        ValueError: the split has no usable image, or none of the classes.
    """
    if is_missing(data):
        if data.source != "shapes":
            raise FileNotFoundError(_missing(data))
        fetch(data)
    read_index = coco.read_index if data.source == "coco" else voc.read_index
    classes = data.classes
    if not classes and split != data.train_split:
        classes = read_index(data.root, data.train_split).classes
    index = read_index(data.root, split, classes)
    absent = index.problems.examples.get("absent_class")
    # A split that is only evaluated on may well lack a class.
    if absent and split == data.train_split:
        raise ConfigError(
            f"data.classes: the annotations of {data.root} ({split}) know no {'; no '.join(absent)}"
            " (empty is all classes of the file)"
        )
    for line in index.problems.summary():
        logger.warning("%s (%s): %s", data.root, split, line)
    return index


def _missing(data: Data) -> str:
    if data.source == "voc07":
        return (
            f"{data.root}: PASCAL VOC 2007 is not there, or not whole; run: "
            "bash tools/download_voc07.sh"
        )
    if data.source == "coco":
        return f"{data.root}: no such folder, or it is empty; {coco.WHAT_TO_FETCH}"
    return (
        f"{data.root}: no such folder, or it is empty; set data.root to a folder with "
        "Annotations/, ImageSets/Main/ and JPEGImages/"
    )
