"""The layouts of data sets that can be read, and which of them a folder has."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType

from tinydet.data import coco, voc, yolo

LAYOUTS: dict[str, ModuleType] = {"voc": voc, "coco": coco, "yolo": yolo}


def layout_of(root: Path) -> str:
    """Return the layout of a folder: "voc", "coco" or "yolo".

    Raises:
        FileNotFoundError: it has none of them.
    """
    if coco.split_names(root):
        return "coco"
    if voc.split_names(root):
        return "voc"
    with contextlib.suppress(FileNotFoundError):
        if yolo.split_names(root):
            return "yolo"
    raise FileNotFoundError(
        f"{root}: has no ImageSets/Main/*.txt (VOC), annotations/instances_*.json (COCO), or "
        "data.yaml with folders of images (YOLO)"
    )
