"""Where checkpoints lose AP50 on their test images, and what changes from one to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tinydet.config import Data
from tinydet.data.dataset import load_split
from tinydet.data.index import Index
from tinydet.evaluation.boxes import ImageDetections
from tinydet.evaluation.error_changes import ErrorChanges, ImageChange, compare_errors
from tinydet.evaluation.tide import tide
from tinydet.evaluation.tide_table import LEGEND, tide_change_lines, tide_lines
from tinydet.report.draw import save_image
from tinydet.training.checkpoint import CheckpointError, load_checkpoint
from tinydet.training.device import pick_device
from tinydet.training.evaluate import detect_split, ground_truth
from tinydet.training.pictures import draw_change
from tinydet.yolof.detector import Detector

_IMAGES = 6  # shown of those that improved, and of those that worsened


@dataclass(frozen=True)
class ErrorOptions:
    """How to look for errors.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        overrides: "a.b=value" for the checkpoints' experiments.
        out: a folder for pictures of the images that changed most; None is none.
    """

    device: str = "auto"
    overrides: tuple[str, ...] = ()
    out: Path | None = None


def error_lines(path: Path, other: Path | None, options: ErrorOptions) -> Iterator[str]:
    """Yield where a checkpoint loses AP50, and what another one changes, line by line.

    Both are run on the test images of the first one's experiment.

    Args:
        path: a checkpoint of either form, or a run's folder: its best.pt, else its last.pt.
        other: another; the first one is the base then.
        options: how.

    Raises:
        ValueError: a file cannot be used, the two know different classes, or the data is missing.
    """
    if options.out is not None:
        if other is None:
            raise ValueError("--out is for pictures of what changed: give OTHER_CHECKPOINT as well")
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out {options.out}: is a file; name a folder")
    device = pick_device(options.device)
    base = _load(path, options.overrides, device)
    idea = None if other is None else _load(other, options.overrides, device)
    if idea is not None and idea.detector.classes != base.detector.classes:
        raise ValueError(
            f"{idea.path}: knows the classes {', '.join(idea.detector.classes)}, and {base.path} "
            f"{', '.join(base.detector.classes)}: compare detectors of the same classes"
        )
    index = load_split(base.data, base.data.test_split)
    truth, count = ground_truth(index), len(index.classes)
    found = _detect(base, index, device)
    yield f"{base.title}, {len(index)} images of {base.data.root}, {base.data.test_split}"
    yield from LEGEND
    if idea is None:
        yield from tide_lines(tide(found, truth, count), index.classes)
        return
    changes = compare_errors(found, _detect(idea, index, device), truth, count)
    yield from tide_lines(changes.base, index.classes)
    yield ""
    yield idea.title
    yield from tide_lines(changes.idea, index.classes)
    yield ""
    yield "the second less the first (of AP50 more is better, of what is lost less is)"
    yield from tide_change_lines(changes.base, changes.idea, index.classes)
    names = [base.name, idea.name]
    if base.name == idea.name:
        names = [f"{loaded.path.parent.name}/{loaded.path.name}" for loaded in (base, idea)]
    yield from image_change_lines(changes, index, names, options.out)


@dataclass(frozen=True)
class _Loaded:
    """A detector with its file, its experiment's name and its data."""

    path: Path
    name: str
    detector: Detector
    data: Data
    batch_size: int

    @property
    def title(self) -> str:
        return f"{self.name} ({self.path})"


def _load(path: Path, overrides: Sequence[str], device: torch.device) -> _Loaded:
    if path.suffix == ".onnx":
        raise ValueError(
            f"{path}: an ONNX file does not say which images it is tested on: name the checkpoint"
        )
    if path.is_dir():
        path = _of_run(path)
    loaded = load_checkpoint(path, device=device, overrides=overrides)
    detector, experiment = loaded.detector, loaded.experiment
    data = replace(experiment.data, classes=detector.classes)
    return _Loaded(path, experiment.name, detector, data, experiment.train.eval_batch_size)


def _of_run(folder: Path) -> Path:
    for name in ("best.pt", "last.pt"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds no best.pt and no last.pt; name a checkpoint")


def _detect(loaded: _Loaded, index: Index, device: torch.device) -> list[ImageDetections]:
    return detect_split(loaded.detector, index, loaded.data, loaded.batch_size, device)


def image_change_lines(
    changes: ErrorChanges, index: Index, names: Sequence[str], out: Path | None
) -> Iterator[str]:
    """Yield the images that changed most, and draw them side by side.

    Args:
        changes: of the index's images.
        index: the test split.
        names: of the base and of the idea.
        out: the folder for `improved_1.jpg`, `worsened_1.jpg` and so on; None draws nothing.
    """
    for word, every in (("improved", changes.improved), ("worsened", changes.worsened)):
        images = every[:_IMAGES]
        yield ""
        most = "; most of all:" if images else ""
        yield f"{word}, at scores of 0.3 or more: {len(every)} of {len(index)} images{most}"
        width = max((len(index.image_ids[image.index]) for image in images), default=0)
        for place, image in enumerate(images, 1):
            line = f"  {index.image_ids[image.index]:{width}}  {_in_words(image)}"
            if out is not None:
                drawing = draw_change(image, index, names)
                file = out / f"{word}_{place}.jpg"
                if drawing is not None:
                    save_image(drawing, file)
                    line += f"  {file}"
            yield line
        if out is not None:
            # What an earlier comparison left would pass for one of this.
            for place in range(len(images) + 1, _IMAGES + 1):
                (out / f"{word}_{place}.jpg").unlink(missing_ok=True)


def _in_words(change: ImageChange) -> str:
    return (
        f"boxes: {change.found.sum()} found, {change.lost.sum()} lost; "
        f"false detections: {change.gone.sum()} gone, {change.new.sum()} new"
    )
