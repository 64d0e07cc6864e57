"""Resuming a run: what comes from the checkpoint, and which settings may change.

The position in the run is kept as a fraction of its epochs, so another batch size, number of
processes or number of epochs keeps its place in the learning-rate schedule. A changed setting
either takes effect from here on or is refused; `tools/README.md` has the table.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinydet.config import Experiment, Model
from tinydet.experiment_file import experiment_from_dict
from tinydet.training.checkpoint import CheckpointError
from tinydet.training.device import training_dtypes
from tinydet.training.state import TrainingState

logger = logging.getLogger(__name__)

# The rest of the model is the network, whose weights and optimizer state are in the checkpoint.
_CHANGEABLE_IN_MODEL = {
    "match_topk",
    "match_pos_ignore",
    "match_neg_ignore",
    "center_clamp",
    "score_threshold",
    "nms_iou",
    "candidates",
    "max_detections",
}
FIXED_FIELDS = (
    *(f"model.{f.name}" for f in dataclasses.fields(Model) if f.name not in _CHANGEABLE_IN_MODEL),
    "optim.optimizer",
    "train.seed",
)

_NEEDED = (
    *("epoch", "step", "batches_an_epoch", "raw_model", "optimizer", "scaler"),
    *("train_seconds", "images_seen"),
)


def check_resumable(experiment: Experiment, content: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint that the experiment cannot be resumed from.

    Args:
        experiment: what is to be trained.
        content: the checkpoint.
        path: where it was read from.

    Raises:
        CheckpointError: it is folded, incomplete, finished, or of an experiment with other
            `FIXED_FIELDS`.
    """
    if content["form"] != "training":
        raise CheckpointError(f"{path}: a folded network cannot be trained on; take last.pt")
    missing = [name for name in _NEEDED if name not in content]
    if missing:
        raise CheckpointError(f"{path}: cannot be resumed, it has no {missing[0]!r}; take last.pt")
    if content["epoch"] >= experiment.train.epochs:
        raise CheckpointError(
            f"{path}: that run has finished its {content['epoch']} epochs; "
            "give it more with --set train.epochs=N"
        )
    before = experiment_from_dict(content["experiment"])
    changes = _changes(before, experiment)
    changed = [changes[path] for path in FIXED_FIELDS if path in changes]
    if changed:
        raise CheckpointError(
            f"{path}: a resumed run cannot change {', '.join(changed)}; "
            "resume with the old value, or start a new run"
        )


def keep_precision(
    experiment: Experiment, content: dict[str, Any], device: torch.device
) -> Experiment:
    """Return the experiment with what "auto" chose when the checkpoint's run began.

    On a device that does not train in that dtype, as a CPU in float16, "auto" chooses again.
    """
    if content.get("dtype", "float32") not in training_dtypes(device):
        return experiment
    train = experiment.train
    chosen = {
        name: content[name]
        for name in ("dtype", "memory_format")
        if getattr(train, name) == "auto" and name in content
    }
    return replace(experiment, train=replace(train, **chosen))


def changed_settings(
    experiment: Experiment, content: dict[str, Any], device: torch.device
) -> list[str]:
    """Return what a resumed run trains differently from here on, such as "train.epochs 2 -> 3"."""
    before = keep_precision(experiment_from_dict(content["experiment"]), content, device)
    return [*_changes(without_side_settings(before), without_side_settings(experiment)).values()]


def without_side_settings(experiment: Experiment) -> Experiment:
    """Return the experiment with defaults for the settings that do not decide its last weights."""
    train = replace(
        experiment.train,
        device="auto",
        eval_every=1,
        eval_batch_size=1,
        save_minutes=0.0,
        keep_every=0,
    )
    data = replace(experiment.data, workers=0, cache_mb=0)
    return replace(experiment, data=data, train=train)


def restore(state: TrainingState, content: dict[str, Any], path: Path) -> None:
    """Put a checkpoint that `check_resumable` has accepted into a run, all but `best_ap50`.

    Raises:
        CheckpointError: its classes or weights are not those of this run.
    """
    if tuple(content["classes"]) != state.detector.classes:
        raise CheckpointError(
            f"{path}: trained on other classes ({', '.join(content['classes'])}); "
            "resume it with its own data"
        )
    hyperparameters = [_hyperparameters(group) for group in state.optimizer.param_groups]
    try:
        state.detector.load_state_dict(content["raw_model"] or content["model"])
        if state.ema is not None:
            state.ema.module.load_state_dict(content["model"])
            state.ema.updates = content["ema_updates"]
        state.optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: its weights are not those of this experiment's model"
        ) from error
    state.precision.prepare(state.detector)
    # Fused optimizers pair elements by their place in memory, which the memory format decides.
    for parameter, tensors in state.optimizer.state.items():
        for name, tensor in tensors.items():
            if torch.is_tensor(tensor) and tensor.shape == parameter.shape:
                tensors[name] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    # The checkpoint's would silently take the place of the experiment's.
    for group, values in zip(state.optimizer.param_groups, hyperparameters, strict=True):
        group.update(values)
        for parameter in group["params"]:
            if group.get("momentum"):  # SGD that had none until now
                state.optimizer.state[parameter].setdefault(
                    "momentum_buffer", torch.zeros_like(parameter)
                )
    if content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    state.epoch = content["epoch"]
    state.step = _position(state, content["step"], content["batches_an_epoch"])
    # Checkpoints of version 0.1 could not change it on the way.
    counted = content["epoch"] * content["batches_an_epoch"] + content["step"]
    state.steps_done = content.get("steps_done", counted)
    state.train_seconds = content["train_seconds"]
    state.images_seen = content["images_seen"]
    state.set_learning_rate()


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _position(state: TrainingState, step: int, batches_an_epoch: int) -> int:
    """Return the batches done of an epoch that had another number of them when they were done."""
    now = step * state.batches_an_epoch // batches_an_epoch
    if now < state.batches_an_epoch:
        # Accumulated gradients are not in the checkpoint: these batches are repeated.
        now -= now % state.experiment.train.accumulate
    return now


def _changes(before: Experiment, after: Experiment) -> dict[str, str]:
    """Return "path old -> new" by path for each field that differs, without the name."""
    one, two = (_fields(dataclasses.asdict(e)) for e in (before, after))
    return {
        path: f"{path} {value!r} -> {two[path]!r}"
        for path, value in one.items()
        if path != "name" and value != two[path]
    }


def _fields(group: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, dict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields
