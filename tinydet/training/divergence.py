"""Steps whose loss or gradient is no number: skipped, named, kept, and too many end the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinydet.atomic import replacing
from tinydet.data.sample import Batch
from tinydet.training.checkpoint import write_tensors
from tinydet.training.distributed import gathered, in_any_process, rank, world_size
from tinydet.training.saving import going_on
from tinydet.training.state import TrainingState

logger = logging.getLogger(__name__)

# Batches are large: a run that fails now and then must not fill the disk with them.
_MOST_FILES = 10


class DivergedError(ValueError):
    """The loss is no longer a number; the message names the step and the likely causes."""


@dataclass
class _Step:
    """One optimiser step: where it was, what went in, what came out, how to undo it."""

    epoch: int
    number: int
    batches: list[Batch]
    losses: list[dict[str, Tensor]]
    buffers: list[Tensor]
    bad: Tensor
    copied: torch.cuda.Event | None = None


class BadSteps:
    """Finds the optimiser steps whose loss or gradient is NaN or infinite, and undoes them.

    Of such a step nothing stays: not in the weights, nor in the averaged ones, nor in the
    statistics of norms. On a CPU that is exact. On a GPU waiting for each step's verdict would
    cost time: the optimiser skips the step on the device, and the host reads the verdict one step
    later; then the statistics go back to what they were before it, and the averaged weights have
    been drawn to unchanged ones.

    In float16 an infinite gradient only tells that the loss was scaled too much, which the scaler
    corrects and skips itself: there the loss alone decides.

    Args:
        state: the run.
        run_dir: where batches are kept for a look, as `bad_step_<number>.pt`.
        lag: steps between a step and its verdict.
    """

    def __init__(self, state: TrainingState, run_dir: Path, lag: int | None = None) -> None:
        self._state = state
        self._run_dir = run_dir
        networks = [state.detector] + ([] if state.ema is None else [state.ema.module])
        buffers = [b for network in networks for b in network.buffers()]
        self._buffers = [b for b in buffers if b.is_floating_point()]
        on_gpu = self._buffers[0].is_cuda
        self._lag = int(on_gpu) if lag is None else lag
        self._copies = [[b.clone() for b in self._buffers] for _ in range(self._lag + 1)]
        self._waiting: list[_Step] = []
        self._batches: list[Batch] = []
        self._losses: list[dict[str, Tensor]] = []

    def begin(self, batch: Batch) -> None:
        """Note a batch before its forward pass."""
        if not self._batches:
            # In turn: the oldest copy belongs to a step whose verdict is known.
            self._copies.append(self._copies.pop(0))
            torch._foreach_copy_(self._copies[-1], self._buffers)
        self._batches.append(batch)

    def end(self, losses: Mapping[str, Tensor]) -> None:
        """Note the losses of that batch."""
        self._losses.append({name: loss.detach() for name, loss in losses.items()})

    def skips(self, gradient_norm: Tensor) -> bool:
        """Judge the optimiser step that is about to be made of the batches noted.

        Returns:
            Whether to leave it out. Without an answer yet, the optimiser is told to leave it out on
            the device should it be bad.

        Raises:
            DivergedError: it is one too many in a row.
        """
        state = self._state
        values = [loss for losses in self._losses for loss in losses.values()]
        if not state.scaler.is_enabled():
            values.append(gradient_norm)
        bad = in_any_process(~torch.stack(values).isfinite().all())
        step = _Step(
            epoch=state.epoch + 1,
            number=state.steps_done,
            batches=self._batches,
            losses=self._losses,
            buffers=self._copies[-1],
            bad=bad,
        )
        self._batches, self._losses = [], []
        if self._lag and not state.scaler.is_enabled():
            state.optimizer.found_inf = bad.float()  # What a GradScaler gives fused optimisers.
        if bad.is_cuda:
            step.bad = torch.empty((), dtype=torch.bool, pin_memory=True)
            step.bad.copy_(bad, non_blocking=True)
            step.copied = torch.cuda.Event()
            step.copied.record()
        self._waiting.append(step)
        verdicts = [self._judge() for _ in range(len(self._waiting) - self._lag)]
        return self._lag == 0 and verdicts[-1]

    def settle(self) -> None:
        """Wait for the verdicts still out, as before a checkpoint is written."""
        while self._waiting:
            self._judge()

    def _judge(self) -> bool:
        step, state = self._waiting.pop(0), self._state
        if step.copied is not None:
            step.copied.synchronize()
        if not step.bad:
            state.bad_in_a_row = 0
            return False
        state.bad_in_a_row += 1
        torch._foreach_copy_(self._buffers, step.buffers)
        self._report(step)
        if state.bad_in_a_row >= state.experiment.train.max_bad_steps:
            raise DivergedError(
                f"epoch {step.epoch}, step {step.number}: {state.bad_in_a_row} steps in a row had "
                "a loss or gradient that is no number; likely causes: a learning rate too high "
                "(optim.lr), a warm-up too short (optim.warmup_iters), no clipping "
                f"(optim.clip_norm), or the data: see {self._run_dir}/bad_step_*.pt; "
                "last.pt is from before these steps"
            )
        return True

    def _report(self, step: _Step) -> None:
        means = {
            name: sum(losses[name].item() for losses in step.losses) / len(step.losses)
            for name in step.losses[0]
        }
        values = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        finite = torch.tensor(list(means.values())).isfinite().all()
        process = f".process{rank()}" if world_size() > 1 else ""
        path = self._run_dir / f"bad_step_{step.number:06d}{process}.pt"
        image_ids = gathered({name: None for batch in step.batches for name in batch.image_ids})
        where = ""
        if len(list(self._run_dir.glob("bad_step_*.pt"))) < _MOST_FILES:
            with going_on(path):
                _save_batches(path, step)
                where = f"; they are kept in {path}"
        logger.warning(
            "epoch %d, step %d: the %s is no number (%s), so the step is skipped; its images: %s%s",
            step.epoch,
            step.number,
            "gradient" if finite else "loss",
            values,
            ", ".join(image_ids),
            where,
        )


def _save_batches(path: Path, step: _Step) -> None:
    """Write a step's batches as plain data: `torch.load(path, weights_only=True)` reads them."""
    batches = [batch.to("cpu") for batch in step.batches]
    content = {
        "epoch": step.epoch,
        "step": step.number,
        "batches": [
            {
                "image_ids": batch.image_ids,
                "images": batch.images,
                "targets": batch.targets,
                "losses": {name: loss.item() for name, loss in losses.items()},
            }
            for batch, losses in zip(batches, step.losses, strict=True)
        ],
    }
    with replacing(path) as temporary:
        write_tensors(temporary, content)
