"""Checkpoint files: tensors, numbers and strings, written atomically.

A checkpoint is a dict:
    version: of TinyDet.
    form: "training" (the network with its branches and norms) or "deploy" (folded).
    experiment: the resolved experiment as nested dicts.
    classes: class names in label order.
    model: the state dict to evaluate and deploy: the averaged weights if the run averages them.
    epoch: epochs trained and evaluated.

A training checkpoint also holds what an exact resume needs: step (batches done of the next epoch,
of batches_an_epoch), steps_done (of the whole run), raw_model, optimizer, scaler, ema_updates,
best_ap50, train_seconds, images_seen. Random number generators need no state: each step and each
image has a seed of its own.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from tinydet import __version__
from tinydet.atomic import replacing
from tinydet.config import Experiment, Model
from tinydet.experiment_file import experiment_from_dict, override
from tinydet.reparam.fold import fold
from tinydet.yolof.build import build_detector
from tinydet.yolof.detector import Detector
from tinydet.yolof.official import convert_official

logger = logging.getLogger(__name__)


# What every checkpoint holds, and whether a value is of its kind.
_CONTENT: dict[str, Callable[[Any], bool]] = {
    "classes": lambda names: isinstance(names, list) and all(isinstance(n, str) for n in names),
    "experiment": lambda values: isinstance(values, dict),
    "form": lambda form: form in ("training", "deploy"),
    "model": lambda tensors: (
        isinstance(tensors, dict) and all(map(torch.is_tensor, tensors.values()))
    ),
}

# Decide the network, but not always the names and shapes of its tensors.
_NOT_IN_TENSORS = ("backbone", "feature", "activation", "dilations", "anchor_scales")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, the reason and the remedy."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: if the process dies, `path` still holds a complete one."""
    with replacing(path) as temporary:
        _write(temporary, content)


def save_last(path: Path, content: dict[str, Any]) -> None:
    """Write a run's last.pt; the old one becomes last.previous.pt.

    If the process dies, `read_last` still finds a complete checkpoint.
    """
    with replacing(path) as temporary:
        _write(temporary, content)
        if path.exists():
            os.replace(path, previous_of(path))


def previous_of(last: Path) -> Path:
    """Return the path of the checkpoint that was last.pt before this one."""
    return last.with_name(f"{last.stem}.previous{last.suffix}")


def _write(path: Path, content: dict[str, Any]) -> None:
    write_tensors(path, {"version": __version__, **content})


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain data for `torch.load(path, weights_only=True)`.

    Raises:
        OSError: the file cannot be written; torch itself often raises a RuntimeError instead.
    """
    outer = sys.exc_info()[1]
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch fails again as it closes the truncated archive, which hides the first error: a full
        # disk, a second Ctrl-C, a dead loader process.
        if error.__context__ not in (None, outer):
            raise error.__context__ from None
        raise


def read_last(path: Path) -> dict[str, Any]:
    """Read a run's last.pt; if it is corrupt or missing, fall back to last.previous.pt.

    A corrupt last.pt is renamed last.damaged.pt.

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
        logger.warning("%s: falling back to %s (epoch %d)", error, previous, content["epoch"])
    if path.is_file():
        # Otherwise the next save would replace the good last.previous.pt with it.
        os.replace(path, path.with_name("last.damaged.pt"))
    return content


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without executing code from it, after verifying its checksums.

    Published YOLOF detectors (`tinydet.yolof.official`) are read as training checkpoints.

    Raises:
        CheckpointError: it is missing, damaged, not such a checkpoint, or holds more than tensors
            and plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint in it: {path / 'best.pt'}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not _is_bare_pickle(path):
        _check_whole(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A crafted file can make torch raise anything.
        raise CheckpointError(
            f"{path}: refused: it is no checkpoint, or holds more than tensors, numbers and strings"
        ) from error
    try:
        content = convert_official(content) or content
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for name, is_right in _CONTENT.items():
        if not isinstance(content, dict) or name not in content:
            raise CheckpointError(f"{path}: not a TinyDet checkpoint, it has no {name!r}")
        if not is_right(content[name]):
            raise CheckpointError(f"{path}: not a TinyDet checkpoint, its {name!r} is malformed")
    return content


def _is_bare_pickle(path: Path) -> bool:
    """Return whether a file is in torch's old format without checksums, as MMDetection's are."""
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def _check_whole(path: Path) -> None:
    """Verify an archive's members against their CRC-32s, which torch writes but never checks."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except PermissionError:
        raise
    except Exception as error:  # A damaged archive raises many types of errors.
        raise CheckpointError(
            f"{path}: damaged or cut short, or no checkpoint; use another one"
        ) from error
    if bad is not None:
        raise CheckpointError(f"{path}: damaged ({bad}); use another checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, with its detector rebuilt.

    Attributes:
        detector: in evaluation mode.
        experiment: the stored one, or what `load_checkpoint` was given in its place.
        content: the whole dict of the file, tensors on the CPU.
    """

    detector: Detector
    experiment: Experiment
    content: dict[str, Any]

    @property
    def folded(self) -> bool:
        """Whether the file holds the deploy form."""
        return bool(self.content["form"] == "deploy")


def load_checkpoint(
    path: str | Path,
    experiment: Experiment | None = None,
    device: str | torch.device = "cpu",
    overrides: Sequence[str] = (),
) -> Checkpoint:
    """Read a checkpoint of either form and rebuild its detector.

    Args:
        path: the checkpoint.
        experiment: replaces the stored one; its model must have the same weights.
        device: where the detector goes.
        overrides: "a.b=value" assignments applied to the experiment.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its weights do not fit the experiment.
        ConfigError: an override is wrong.
    """
    content = read_checkpoint(path)
    stored = experiment_from_dict(content["experiment"])
    experiment = override(experiment or stored, overrides)
    _check_same_network(path, stored.model, experiment.model)
    detector = build_unloaded(experiment.model, content["classes"])
    if content["form"] == "deploy":
        folded, _ = fold(detector.eval(), torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        detector = cast(Detector, folded)
    try:
        detector.load_state_dict(content["model"])
    except RuntimeError as error:
        own = content["experiment"].get("name")
        raise CheckpointError(
            f"{path}: its weights are not those of experiment {experiment.name!r}; it was trained "
            f"as {own!r}: give that experiment (experiment.json beside the checkpoint)"
        ) from error
    return Checkpoint(detector.eval().to(device), experiment, content)


def _check_same_network(path: str | Path, stored: Model, given: Model) -> None:
    for name in _NOT_IN_TENSORS:
        before, now = getattr(stored, name), getattr(given, name)
        if name == "backbone":  # The tag after the dot names published weights.
            before, now = before.partition(".")[0], now.partition(".")[0]
        if before != now:
            raise CheckpointError(
                f"{path}: was trained with model.{name}={before}, and would be another network "
                f"with {now}; give its own experiment (experiment.json beside the checkpoint)"
            )


def build_unloaded(model: Model, classes: Sequence[str]) -> Detector:
    """Build a detector whose weights are about to be replaced: no weights are downloaded."""
    return build_detector(dataclasses.replace(model, weights="random"), classes)
