"""Everything that changes while a run trains, and how it is put into a checkpoint and back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tinydet.config import Experiment
from tinydet.data.sample import Batch
from tinydet.experiment_file import experiment_to_dict
from tinydet.training.checkpoint import CheckpointError
from tinydet.training.distributed import (
    from_first,
    parallel,
    with_synced_norms,
    world_size,
)
from tinydet.training.ema import AveragedWeights
from tinydet.training.optim import Plan, make_optimizer, make_plan
from tinydet.training.precision import Precision, choose_precision
from tinydet.yolof.detector import Detector

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """A run in progress.

    Attributes:
        experiment: what is trained.
        detector: the network being trained.
        network: the same, averaging gradients where several processes train it.
        ema: its averaged weights, if there are any.
        optimizer: steps the detector's weights.
        schedule: steps the learning rate, once an optimiser step.
        scaler: scales the loss in float16, else does nothing.
        plan: iterations and learning rate after scaling.
        precision: dtype and memory format of a step.
        batches_an_epoch: length of the loader.
        epoch: epochs done and evaluated.
        step: batches done of the epoch after those; all of them where its evaluation is to come.
        best_ap50: highest so far.
        train_seconds: spent in training steps, without evaluation.
        images_seen: trained on so far.
        bad_in_a_row: steps since the last one whose loss and gradient were numbers.
    """

    experiment: Experiment
    detector: Detector
    network: nn.Module
    ema: AveragedWeights | None
    optimizer: Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    plan: Plan
    precision: Precision
    batches_an_epoch: int
    epoch: int = 0
    step: int = 0
    best_ap50: float = -1.0
    train_seconds: float = 0.0
    images_seen: int = 0
    bad_in_a_row: int = 0

    @property
    def steps_done(self) -> int:
        """Batches trained on since the run began."""
        return self.epoch * self.batches_an_epoch + self.step

    @property
    def lr(self) -> float:
        """Learning rate of the next optimiser step, outside the backbone."""
        return self.optimizer.param_groups[-1]["lr"]

    @property
    def at_optimizer_step(self) -> bool:
        """Whether no gradients wait for the rest of their optimiser step."""
        whole = self.step == self.batches_an_epoch
        return whole or self.step % self.experiment.train.accumulate == 0

    @property
    def shipped(self) -> Detector:
        """The network to evaluate and ship; its mode is the caller's affair."""
        return self.ema.module if self.ema is not None else self.detector

    def checkpoint(self) -> dict[str, Any]:
        """Return what `save_checkpoint` writes."""
        return {
            "form": "training",
            "experiment": experiment_to_dict(self.experiment),
            "classes": list(self.detector.classes),
            "model": self.shipped.state_dict(),
            "raw_model": self.detector.state_dict() if self.ema is not None else None,
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.schedule.last_epoch,
            "scaler": self.scaler.state_dict(),
            "dtype": self.precision.dtype,
            "memory_format": self.precision.memory_format,
            "batches_an_epoch": self.batches_an_epoch,
            "epoch": self.epoch,
            "step": self.step,
            "best_ap50": self.best_ap50,
            "train_seconds": self.train_seconds,
            "images_seen": self.images_seen,
        }

    def resume(self, content: dict[str, Any], path: Path) -> None:
        """Put a checkpoint's state, read from `path`, into this run.

        Raises:
            CheckpointError: it is of another experiment, or not one to go on from.
        """
        if content["form"] != "training":
            raise CheckpointError(f"{path}: a folded network cannot be trained on; take last.pt")
        if tuple(content["classes"]) != self.detector.classes:
            raise CheckpointError(
                f"{path}: trained on other classes ({', '.join(content['classes'])}); "
                "resume it with its own data"
            )
        if content["epoch"] >= self.experiment.train.epochs:
            raise CheckpointError(
                f"{path}: that run has finished its {content['epoch']} epochs; "
                "give it more with --set train.epochs=N"
            )
        try:
            self.detector.load_state_dict(content["raw_model"] or content["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(content["model"])
                self.ema.updates = content["ema_updates"]
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: not a run of this experiment's model and optimiser"
            ) from error
        self.scaler.load_state_dict(content["scaler"])
        # The rate follows from the step alone: a prolonged run gets its own schedule's.
        self.schedule.last_epoch = content["iteration"]
        for group, base, factor in zip(
            self.optimizer.param_groups,
            self.schedule.base_lrs,
            self.schedule.lr_lambdas,
            strict=True,
        ):
            group["lr"] = base * factor(content["iteration"])
        self.epoch = content["epoch"]
        self.step = content.get("step", 0)
        if self.step and content["batches_an_epoch"] != self.batches_an_epoch:
            logger.warning(
                "%s: an epoch had %d batches, now it has %d: epoch %d starts anew",
                *(path, content["batches_an_epoch"], self.batches_an_epoch, self.epoch + 1),
            )
            self.step = 0
        self.best_ap50 = content["best_ap50"]
        self.train_seconds = content["train_seconds"]
        self.images_seen = content["images_seen"]


def keep_precision(experiment: Experiment, content: dict[str, Any]) -> Experiment:
    """Return the experiment with what "auto" chose when the checkpoint's run began."""
    train = experiment.train
    chosen = {
        name: content[name]
        for name in ("dtype", "memory_format")
        if getattr(train, name) == "auto" and name in content
    }
    return replace(experiment, train=replace(train, **chosen))


def start_training(
    experiment: Experiment, detector: Detector, batches_an_epoch: int, first_batch: Batch
) -> TrainingState:
    """Plan the run and build its optimiser around a fresh detector; says what it chose.

    Args:
        experiment: what is trained.
        detector: on its device.
        batches_an_epoch: length of the loader.
        first_batch: a real batch on the same device, for timing steps.
    """
    settings = experiment.train
    device = first_batch.images.device
    steps_an_epoch = -(-batches_an_epoch // settings.accumulate)
    plan = make_plan(
        experiment.optim,
        settings.batch_size * settings.accumulate * world_size(),
        steps_an_epoch * settings.epochs,
    )
    # All time steps, as each waits for the others in its loss; what the first one finds holds.
    timed = choose_precision(settings, device, detector, first_batch.images, first_batch.targets)
    precision = from_first(lambda: timed)
    logger.info("%s, %s: %s", precision.dtype, precision.memory_format, precision.reason)
    for line in plan.lines:
        logger.info(line)
    ema = AveragedWeights(detector, settings.ema_decay) if settings.ema_decay else None
    precision.prepare(detector)
    if settings.sync_norms and world_size() > 1:
        detector = with_synced_norms(detector, device)
    if settings.compile:
        for part in (detector.backbone, detector.encoder, detector.head):
            part.compile()
    optimizer, schedule = make_optimizer(detector, experiment.optim, plan)
    return TrainingState(
        experiment=experiment,
        detector=detector,
        network=parallel(detector, device),
        ema=ema,
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(device.type, enabled=precision.dtype == "float16"),
        plan=plan,
        precision=precision,
        batches_an_epoch=batches_an_epoch,
    )
