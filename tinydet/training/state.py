"""Everything that changes while a run trains, and how it is put into a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tinydet.config import Experiment
from tinydet.data.sample import Batch
from tinydet.experiment_file import experiment_to_dict
from tinydet.training.distributed import (
    broadcast_from_rank0,
    sync_batchnorm,
    world_size,
    wrap_ddp,
)
from tinydet.training.ema import AveragedWeights
from tinydet.training.optim import Schedule, make_optimizer, make_schedule, set_learning_rate
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
        scaler: scales the loss in float16, else does nothing.
        schedule: iterations and learning rate after scaling.
        precision: dtype and memory format of a step.
        batches_an_epoch: length of the loader.
        epoch: epochs done and evaluated.
        step: batches done of the epoch after those; all of them where its evaluation is to come.
        steps_done: batches trained on since the run began.
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
    scaler: torch.amp.GradScaler
    schedule: Schedule
    precision: Precision
    batches_an_epoch: int
    epoch: int = 0
    step: int = 0
    steps_done: int = 0
    best_ap50: float = -1.0
    train_seconds: float = 0.0
    images_seen: int = 0
    bad_in_a_row: int = 0

    @property
    def optimizer_steps_done(self) -> int:
        """Position in the learning-rate schedule: what epochs and batches done have as steps."""
        accumulate = self.experiment.train.accumulate
        steps_an_epoch = -(-self.batches_an_epoch // accumulate)
        return self.epoch * steps_an_epoch + -(-self.step // accumulate)

    def set_learning_rate(self) -> None:
        """Give the optimiser the rate of its next step."""
        position = self.optimizer_steps_done
        set_learning_rate(self.optimizer, self.experiment.optim, self.schedule, position)

    @property
    def steps_left(self) -> int:
        """Batches still to be trained on."""
        return (self.experiment.train.epochs - self.epoch) * self.batches_an_epoch - self.step

    @property
    def lr(self) -> float:
        """Learning rate of the next optimiser step, outside the backbone."""
        return self.optimizer.param_groups[-1]["lr"]

    def count_batch(self, images: int) -> None:
        """Count a batch of so many images, over all ranks, as trained on."""
        self.step += 1
        self.steps_done += 1
        self.images_seen += images

    @property
    def eval_model(self) -> Detector:
        """The network to evaluate and to deploy: with averaged weights where there are any."""
        return self.ema.module if self.ema is not None else self.detector

    def checkpoint(self) -> dict[str, Any]:
        """Return what `save_checkpoint` writes."""
        return {
            "form": "training",
            "experiment": experiment_to_dict(self.experiment),
            "classes": list(self.detector.classes),
            "model": self.eval_model.state_dict(),
            "raw_model": self.detector.state_dict() if self.ema is not None else None,
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "dtype": self.precision.dtype,
            "memory_format": self.precision.memory_format,
            "batches_an_epoch": self.batches_an_epoch,
            "epoch": self.epoch,
            "step": self.step,
            "steps_done": self.steps_done,
            "best_ap50": self.best_ap50,
            "train_seconds": self.train_seconds,
            "images_seen": self.images_seen,
        }


def start_training(
    experiment: Experiment, detector: Detector, batches_an_epoch: int, first_batch: Batch
) -> TrainingState:
    """Schedule the run and build its optimiser around a fresh detector; says what it chose.

    Args:
        experiment: what is trained.
        detector: on its device.
        batches_an_epoch: length of the loader.
        first_batch: a real batch on the same device, for timing steps.
    """
    settings = experiment.train
    device = first_batch.images.device
    steps_an_epoch = -(-batches_an_epoch // settings.accumulate)
    schedule = make_schedule(
        experiment.optim,
        settings.batch_size * settings.accumulate * world_size(),
        steps_an_epoch * settings.epochs,
    )
    # All time steps, as each waits for the others in its loss; what the first one finds holds.
    timed = choose_precision(settings, device, detector, first_batch.images, first_batch.targets)
    precision = broadcast_from_rank0(lambda: timed)
    logger.info("%s, %s: %s", precision.dtype, precision.memory_format, precision.reason)
    for line in schedule.lines:
        logger.info(line)
    ema = AveragedWeights(detector, settings.ema_decay) if settings.ema_decay else None
    precision.prepare(detector)
    if settings.sync_norms and world_size() > 1:
        detector = sync_batchnorm(detector, device)
    if settings.compile:
        for part in (detector.backbone, detector.encoder, detector.head):
            part.compile()
    optimizer = make_optimizer(detector, experiment.optim, schedule)
    return TrainingState(
        experiment=experiment,
        detector=detector,
        network=wrap_ddp(detector, device),
        ema=ema,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision.dtype == "float16"),
        schedule=schedule,
        precision=precision,
        batches_an_epoch=batches_an_epoch,
    )
