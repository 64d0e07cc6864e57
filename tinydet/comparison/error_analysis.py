"""Where a checkpoint loses AP50 on its test images, and what another checkpoint changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tinydet.config import Data
from tinydet.data.dataset import load_split
from tinydet.data.index import Index
from tinydet.evaluation.boxes import ImageDetections
from tinydet.evaluation.errors import ErrorChanges, compare_errors
from tinydet.evaluation.tide import tide
from tinydet.evaluation.tide_table import LEGEND, tide_change_lines, tide_lines
from tinydet.report.draw import save_image
from tinydet.report.table import text_table
from tinydet.training.checkpoint import CheckpointError, load_checkpoint
from tinydet.training.device import pick_device
from tinydet.training.evaluate import detect_split, ground_truth
from tinydet.training.pictures import draw_change
from tinydet.yolof.detector import Detector

_IMAGES = 6  # listed of those that improved, and of those that got worse


def error_lines(
    path: Path,
    other: Path | None = None,
    *,
    device: str,
    overrides: Sequence[str] = (),
    out: Path | None = None,
) -> Iterator[str]:
    """Yield lines on where a checkpoint loses AP50, and on what another one changes.

    Both are run on the test images of the first one's experiment.

    Args:
        path: a checkpoint of either form, or a run's folder: its best.pt, else its last.pt.
        other: a checkpoint to compare with the first one, which is the base then.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        overrides: "a.b=value" for the checkpoints' experiments.
        out: folder for pictures of the images that changed most; None draws none.

    Raises:
        ValueError: a file cannot be used, the classes differ, or the data is missing.
    """
    if out is not None:
        if other is None:
            raise ValueError("--out needs a second checkpoint: its pictures show what changed")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: is a file; give a folder")
    where = pick_device(device)
    base = _load(path, overrides, where)
    idea = None if other is None else _load(other, overrides, where)
    if idea is not None and idea.detector.classes != base.detector.classes:
        raise ValueError(
            f"{idea.path}: has the classes {', '.join(idea.detector.classes)}, but {base.path} has "
            f"{', '.join(base.detector.classes)}; compare detectors of the same classes"
        )
    index = load_split(base.data, base.data.test_split)
    truth, count = ground_truth(index), len(index.classes)
    found = _detect(base, index, where)
    yield f"{base.title}, {len(index)} images of {base.data.root}, {base.data.test_split}"
    yield from LEGEND
    if idea is None:
        yield from tide_lines(tide(found, truth, count), index.classes)
        return
    changes = compare_errors(found, _detect(idea, index, where), truth, count)
    yield from tide_lines(changes.base, index.classes)
    yield ""
    yield idea.title
    yield from tide_lines(changes.idea, index.classes)
    yield ""
    yield "change from the first to the second (for AP50 higher is better, for losses lower is)"
    yield from tide_change_lines(changes.base, changes.idea, index.classes)
    names = [base.name, idea.name]
    if base.name == idea.name:
        names = [f"{loaded.path.parent.name}/{loaded.path.name}" for loaded in (base, idea)]
    yield from image_change_lines(changes, index, names, out)


@dataclass(frozen=True)
class _Loaded:
    """A detector, with its file and with the name and data of its experiment."""

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
            f"{path}: an ONNX file does not say which images it is tested on; give the checkpoint"
        )
    if path.is_dir():
        path = _checkpoint_of(path)
    loaded = load_checkpoint(path, device=device, overrides=overrides)
    detector, experiment = loaded.detector, loaded.experiment
    data = replace(experiment.data, classes=detector.classes)
    return _Loaded(path, experiment.name, detector, data, experiment.train.eval_batch_size)


def _checkpoint_of(folder: Path) -> Path:
    for name in ("best.pt", "last.pt"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds no best.pt or last.pt; give a checkpoint")


def _detect(loaded: _Loaded, index: Index, device: torch.device) -> list[ImageDetections]:
    return detect_split(loaded.detector, index, loaded.data, loaded.batch_size, device)


def image_change_lines(
    changes: ErrorChanges, index: Index, names: Sequence[str], out: Path | None
) -> Iterator[str]:
    """Yield a table of the images that improved most and one of those that got worse; draw them.

    Args:
        changes: of the index's images.
        index: the test split.
        names: names of the base and of the idea.
        out: the folder for `improved_1.jpg`, `worsened_1.jpg` and so on; None draws nothing.
    """
    header = ["image", "objects gained", "lost", "false detections removed", "added"]
    for word, every in (("improved", changes.improved), ("worsened", changes.worsened)):
        yield ""
        yield f"{word}, at scores of 0.3 or more: {len(every)} of {len(index)} images"
        rows, files = [], []
        for change in every[:_IMAGES]:
            boxes = (change.found, change.lost, change.gone, change.new)
            rows.append([index.image_ids[change.index], *(str(b.sum()) for b in boxes)])
            drawing = None if out is None else draw_change(change, index, names)
            files.append("-")
            if out is not None and drawing is not None:
                files[-1] = str(out / f"{word}_{len(files)}.jpg")
                save_image(drawing, files[-1])
        if rows and out is not None:
            rows = [[*row, file] for row, file in zip(rows, files, strict=True)]
            yield from text_table([*header, "picture"], rows)
        elif rows:
            yield from text_table(header, rows)
        if out is not None:
            # Pictures of an earlier comparison would be mistaken for ones of this.
            for place in range(len(rows) + 1, _IMAGES + 1):
                (out / f"{word}_{place}.jpg").unlink(missing_ok=True)
