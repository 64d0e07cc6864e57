"""Checkpoints: tensors, numbers and strings, written whole or not at all.

A checkpoint is a dict:
    version: of TinyDet.
    form: "training" (the network with its branches and norms) or "deploy" (folded).
    experiment: the resolved experiment as nested dicts.
    classes: class names in label order.
    model: the state dict to evaluate and ship: the averaged weights where there are any.
    epoch: epochs done, and in the training form what a run needs to go on: raw_model, optimizer,
    schedule, scaler, ema_updates, best_ap50, train_seconds, images_seen.
"""

from __future__ import annotations

import dataclasses
import pickle
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


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which, why and what to do."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` always holds a whole one, whenever the process dies."""
    with replacing(path) as temporary:
        torch.save({"version": __version__, **content}, temporary)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running any code in it.

    Raises:
        CheckpointError: it is missing, damaged, not ours, or holds more than plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint in it: {path / 'best.pt'}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it is no checkpoint, damaged, or holds more than tensors, numbers "
            "and strings"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut short; use another checkpoint") from error
    missing = {"form", "experiment", "classes", "model"} - set(
        content if isinstance(content, dict) else ()
    )
    if missing:
        raise CheckpointError(f"{path}: not a TinyDet checkpoint, it has no {sorted(missing)[0]!r}")
    return content


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
