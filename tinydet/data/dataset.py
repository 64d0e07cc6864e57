"""The samples of a split as a Dataset, and from an experiment's `data` to the split's index."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinydet.config import ConfigError, Data
from tinydet.data import coco, voc
from tinydet.data.image import read_image
from tinydet.data.index import Index
from tinydet.data.layouts import LAYOUTS, layout_of
from tinydet.data.sample import Sample
from tinydet.data.seeding import seeded_generator

logger = logging.getLogger(__name__)

# By `data.source`: "folder" is a user's own data in VOC layout.
_LAYOUT = {"voc07": "voc", "shapes": "voc", "folder": "voc", "coco": "coco", "yolo": "yolo"}


class DetectionDataset(Dataset[Sample]):
    """The images of an index as samples; one that cannot be decoded raises ValueError.

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
        path, exif_rotated = self.index.image_path(i), bool(self.index.exif_rotated[i])
        return self.sample(i, read_image(path, exif_rotated))

    def sample(self, i: int, image: Tensor, reduction: int = 1) -> Sample:
        """Return sample `i` for its decoded image.

        Args:
            i: number of the image.
            image: (3, H, W) uint8 RGB as `read_image` returned it.
            reduction: factor by which the image was reduced in decoding; boxes are divided by it.
        """
        boxes, labels, difficult = self.index.objects(i)
        return Sample(
            image=image,
            # Copies, as the index is shared.
            boxes=torch.tensor(boxes) / reduction,
            labels=torch.tensor(labels),
            difficult=torch.tensor(difficult),
            image_id=self.index.image_ids[i],
            size=self.index.size(i),
            scale=(1 / reduction, 1 / reduction),
        )


def is_missing(data: Data) -> bool:
    """Whether the data's folder is missing, empty, or has only half of VOC 2007."""
    root = _root(data)
    if not root.is_dir() or not any(root.iterdir()):
        return True
    if data.source != "voc07":
        return False
    # Only VOC's own splits: a misspelt name must not cause a download.
    wanted = {data.train_split, data.test_split} & {"train", "val", "trainval", "test"}
    return not wanted <= set(voc.split_names(root))


def fetch(data: Data) -> None:
    """Download VOC 2007, or render the synthetic set.

    Raises:
        FileNotFoundError: the source is "folder", "coco" or "yolo", for which there is no download.
        DownloadError: the download failed; the message says what to do.
        ValueError: `data.root` is not a folder that the download unpacks to.
    """
    root = _root(data)
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
    """Read one split; the synthetic set is rendered first if it is missing.

    Problems of the data are logged as warnings, one line per rule. Without `data.classes` the class
    names are those of the training split for every split, so that labels mean the same.

    Args:
        data: the experiment's data.
        split: name of the split, e.g. `data.train_split`.

    Raises:
        FileNotFoundError: the folder or the split is missing; the message says what to do.
        ConfigError: `data.classes` names a class that the training split of COCO or YOLO lacks.
        ValueError: the split has no usable image, or none of the classes.
    """
    try:
        if is_missing(data):
            if data.source != "shapes":
                raise FileNotFoundError(_missing(data))
            fetch(data)
        index = _read_index(data, split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{_other_layout(data)}") from None
    absent = index.problems.examples.get("absent_class")
    # A split for evaluation may well lack a class.
    if absent and split == data.train_split:
        raise ConfigError(
            f"data.classes: {data.root} ({split}) does not have {'; '.join(absent)} "
            "(leave it empty for all of its classes)"
        )
    for line in index.problems.summary():
        logger.warning("%s (%s): %s", data.root, split, line)
    return index


def _root(data: Data) -> Path:
    return Path(os.path.expanduser(data.root))


def _read_index(data: Data, split: str) -> Index:
    read_index = LAYOUTS[_LAYOUT[data.source]].read_index
    classes = data.classes
    if not classes and split != data.train_split:
        classes = read_index(_root(data), data.train_split).classes
    index: Index = read_index(_root(data), split, classes)
    return index


def _other_layout(data: Data) -> str:
    """Return words on the layout of the data's folder if it is not that of `data.source`."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        layout = layout_of(_root(data))
        if layout != _LAYOUT[data.source]:
            source = "folder" if layout == "voc" else layout
            splits = ", ".join(sorted(LAYOUTS[layout].split_names(_root(data))))
            return (
                f"; it is a folder in {layout.upper()} layout (splits: {splits}): set "
                f"data.source={source}, data.train_split and data.test_split"
            )
    return ""


def _missing(data: Data) -> str:
    if data.source == "voc07":
        splits = voc.split_names(_root(data))
        own = (
            f" (splits: {', '.join(splits)}; for data of your own set data.source=folder, "
            "data.train_split and data.test_split)"
        )
        return (
            f"{data.root}: PASCAL VOC 2007 is missing or incomplete{own if splits else ''}; run: "
            "bash tools/download_voc07.sh"
        )
    if data.source == "coco":
        return f"{data.root}: no such folder, or it is empty; {coco.WHAT_TO_FETCH}"
    parts = (
        "data.yaml" if data.source == "yolo" else "Annotations/, ImageSets/Main/ and JPEGImages/"
    )
    return f"{data.root}: no such folder, or it is empty; set data.root to a folder with {parts}"
