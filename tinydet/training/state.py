"""Everything that changes while a run trains, and its checkpoint."""

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
from tinydet.training.threads import Threads
from tinydet.yolof.detector import Detector

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """A run in progress.

    Attributes:
        experiment: what is trained.
        detector: the network being trained.
        network: the detector, wrapped in DistributedDataParallel if there are several processes.
        ema: averaged weights, None without.
        optimizer: of the detector.
        scaler: scales the loss in float16; disabled otherwise.
        schedule: iterations and learning rate after scaling.
        precision: dtype and memory format of a step.
        threads: how many torch uses on a CPU.
        batches_an_epoch: length of the loader.
        epoch: epochs trained and evaluated.
        step: batches done of the next epoch; all of them if only its evaluation is left.
        steps_done: batches trained on since the run began.
        best_ap50: that of the run's best.pt, -1 before the first.
        train_seconds: spent in training steps, without evaluation.
        images_seen: images trained on, over all processes.
        bad_in_a_row: optimizer steps skipped since the last one that was made.
    """

    experiment: Experiment
    detector: Detector
    network: nn.Module
    ema: AveragedWeights[Detector] | None
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    precision: Precision
    threads: Threads
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
        """Position in the learning-rate schedule."""
        accumulate = self.experiment.train.accumulate
        steps_an_epoch = -(-self.batches_an_epoch // accumulate)
        return self.epoch * steps_an_epoch + -(-self.step // accumulate)

    def set_learning_rate(self) -> None:
        """Set the learning rate of the next optimizer step."""
        position = self.optimizer_steps_done
        set_learning_rate(self.optimizer, self.experiment.optim, self.schedule, position)

    @property
    def steps_left(self) -> int:
        """Batches left in the run."""
        return (self.experiment.train.epochs - self.epoch) * self.batches_an_epoch - self.step

    @property
    def lr(self) -> float:
        """Learning rate of the next optimizer step, outside the backbone."""
        return self.optimizer.param_groups[-1]["lr"]

    def count_batch(self, images: int) -> None:
        """Count a batch with this many images over all ranks."""
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
    experiment: Experiment,
    detector: Detector,
    batches_an_epoch: int,
    first_batch: Batch,
    threads: Threads,
) -> TrainingState:
    """Return the state of a new run; choices made here are logged.

    Args:
        experiment: what is trained.
        detector: on its device.
        batches_an_epoch: length of the loader.
        first_batch: a batch on the same device, of the size of all others, to time steps with.
        threads: adapted to the machine's load.
    """
    settings = experiment.train
    device = first_batch.images.device
    if device.type == "mps":
        logger.warning("TinyDet has not been tested on Apple's GPUs (mps); --device cpu avoids it")
    steps_an_epoch = -(-batches_an_epoch // settings.accumulate)
    # What a step really has: a small training split has fewer images than were asked for.
    batches_a_step = min(settings.accumulate, batches_an_epoch)
    schedule = make_schedule(
        experiment.optim,
        len(first_batch) * batches_a_step * world_size(),
        steps_an_epoch * settings.epochs,
    )
    # Every rank times steps, since the loss synchronizes them; the choice of rank 0 is taken.
    timed = choose_precision(settings, device, detector, first_batch.images, first_batch.targets)
    precision = broadcast_from_rank0(lambda: timed)
    logger.info("%s, %s: %s", precision.dtype, precision.memory_format, precision.reason)
    for line in schedule.lines:
        logger.info(line)
    # Before it is copied: on a GPU torch averages tensors of one layout in one kernel.
    detector.to(memory_format=precision.torch_format)
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
        threads=threads,
        batches_an_epoch=batches_an_epoch,
    )
