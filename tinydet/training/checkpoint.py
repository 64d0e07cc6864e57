"""Checkpoints: tensors, numbers and strings, written whole or not at all.

A checkpoint is a dict:
    version: of TinyDet.
    form: "training" (the network with its branches and norms) or "deploy" (folded).
    experiment: the resolved experiment as nested dicts.
    classes: class names in label order.
    model: the state dict to evaluate and ship: the averaged weights where there are any.
    epoch: epochs done and evaluated, and in the training form what a run needs to go on, exactly
    from where it was: step (batches done of the next epoch, of batches_an_epoch), steps_done (of
    the whole run), raw_model, optimizer, scaler, ema_updates, best_ap50, train_seconds,
    images_seen. Random numbers need no state: each step's and each image's are seeded by what they
    are for.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinydet import __version__
from tinydet.atomic import replacing
from tinydet.config import Experiment, Model
from tinydet.experiment_file import experiment_from_dict
from tinydet.reparam.fold import fold
from tinydet.yolof.detector import Detector, build_detector

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which, why and what to do."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` always holds a whole one, whenever the process dies."""
    with replacing(path) as temporary:
        _write(temporary, content)


def save_last(path: Path, content: dict[str, Any]) -> None:
    """Write a run's last.pt; what it was becomes last.previous.pt.

    Whenever the process dies, a whole one is left where `read_last` looks.
    """
    with replacing(path) as temporary:
        _write(temporary, content)
        if path.exists():
            os.replace(path, previous_of(path))


def previous_of(last: Path) -> Path:
    """Return the name under which the last.pt before this one is kept."""
    return last.with_name(f"{last.stem}.previous{last.suffix}")


def _write(path: Path, content: dict[str, Any]) -> None:
    write_tensors(path, {"version": __version__, **content})


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain data, for `torch.load(path, weights_only=True)`.

    Raises:
        OSError: the file cannot be written; torch alone would often say something else.
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # Closing the archive that the disk has cut short, torch finds it at fault instead.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_last(path: Path) -> dict[str, Any]:
    """Read a run's last.pt, or the one before where it is damaged or was about to be replaced.

    A damaged last.pt is put aside as last.damaged.pt.

    Raises:
        CheckpointError: neither can be used.
    """
    previous = previous_of(path)
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        if path.name != "last.pt" or not previous.is_file():
            raise
        try:
            content = read_checkpoint(previous)
        except CheckpointError as other:
            raise CheckpointError(f"{error}; and {other}") from None
        logger.warning("%s: going on from %s (epoch %d)", error, previous, content["epoch"])
    if path.is_file():
        # Else the next save would put it in the place of the good one.
        os.replace(path, path.with_name("last.damaged.pt"))
    return content


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running any code in it; every byte is checked by its checksum.

    Raises:
        CheckpointError: it is missing, damaged, not ours, or holds more than plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint in it: {path / 'best.pt'}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    _check_whole(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # What a crafted file makes the reader raise is of many types.
        raise CheckpointError(
            f"{path}: refused: it is no checkpoint, or holds more than tensors, numbers and strings"
        ) from error
    missing = {"form", "experiment", "classes", "model"} - set(
        content if isinstance(content, dict) else ()
    )
    if missing:
        raise CheckpointError(f"{path}: not a TinyDet checkpoint, it has no {sorted(missing)[0]!r}")
    return content


def _check_whole(path: Path) -> None:
    """Compare every part of the archive with its CRC-32, which torch writes and does not read.

    torch's formats of old, a tar and a bare pickle, have none and were never ours.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except PermissionError:
        raise
    except Exception as error:  # A damaged archive raises many types, and disks fail too.
        raise CheckpointError(
            f"{path}: damaged or cut short, or no checkpoint; use another one"
        ) from error
    if bad is not None:
        raise CheckpointError(f"{path}: damaged ({bad}); use another checkpoint")


def load_detector(
    path: str | Path, experiment: Experiment | None = None, device: str | torch.device = "cpu"
) -> Detector:
    """Rebuild the detector of a checkpoint, of either form, in evaluation mode.

    Args:
        path: the checkpoint.
        experiment: takes the place of the one stored in it; its model must have the same weights.
        device: where the detector goes.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its weights are not this model's.
    """
    content = read_checkpoint(path)
    experiment = experiment or experiment_from_dict(content["experiment"])
    detector = build_unloaded(experiment.model, content["classes"])
    if content["form"] == "deploy":
        detector, _ = fold(detector.eval(), torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    try:
        detector.load_state_dict(content["model"])
    except RuntimeError as error:
        own = content["experiment"].get("name")
        raise CheckpointError(
            f"{path}: its weights are not those of experiment {experiment.name!r}; it was trained "
            f"as {own!r}: give that experiment (experiment.json beside the checkpoint)"
        ) from error
    return detector.eval().to(device)


def build_unloaded(model: Model, classes: Sequence[str]) -> Detector:
    """Build a detector whose weights are about to be replaced: nothing is fetched."""
    return build_detector(dataclasses.replace(model, weights="random"), classes)
