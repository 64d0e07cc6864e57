"""Optimizer steps with a non-finite loss or gradient: skipped, reported, in the end fatal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinydet.atomic import replacing, warn_on_oserror
from tinydet.data.sample import Batch
from tinydet.training.checkpoint import write_tensors
from tinydet.training.distributed import all_gather_dict, any_rank, rank, world_size
from tinydet.training.state import TrainingState

logger = logging.getLogger(__name__)

# Batches are large: a run that fails now and then must not fill the disk with them.
_MAX_FILES = 10


class DivergedError(ValueError):
    """The loss stays non-finite; the message names the step and the likely causes."""


@dataclass
class _Step:
    """An optimizer step to be judged: its position, inputs, losses, and how to undo it."""

    epoch: int
    number: int
    batches: Sequence[Batch]
    losses: Sequence[Mapping[str, Tensor]]
    buffers: list[Tensor]
    bad: Tensor
    copied: torch.cuda.Event | None = None


class NonFiniteGuard:
    """Skips optimizer steps whose loss or gradient is NaN or infinite.

    A skipped step leaves weights, averaged weights and norm statistics unchanged. That is exact
    except with CUDA, where the host would have to wait for each step's verdict: there the optimizer
    skips the step on the device, in any dtype, and the host reads the verdict one step later,
    restoring the norm statistics from before it (the averaged weights were updated towards
    unchanged weights).

    In float16 an infinite gradient only means that the loss scale was too high, which the scaler
    handles by itself: there only the loss is checked.

    Args:
        state: the run.
        run_dir: where the batches of skipped steps are kept, as `bad_step_<number>.pt`.
        lag: steps between a step and its verdict; None is 1 with CUDA, else 0.
    """

    def __init__(self, state: TrainingState, run_dir: Path, lag: int | None = None) -> None:
        self._state = state
        self._run_dir = run_dir
        networks = [state.detector] + ([] if state.ema is None else [state.ema.module])
        buffers = [b for network in networks for b in network.buffers()]
        self._buffers = [b for b in buffers if b.is_floating_point()]
        self._lag = int(self._buffers[0].is_cuda) if lag is None else lag
        self._snapshots = [[b.clone() for b in self._buffers] for _ in range(self._lag + 1)]
        self._pending: list[_Step] = []

    def snapshot(self) -> None:
        """Remember the norm statistics; call it before the first forward pass of a step."""
        # The oldest snapshot belongs to a step whose verdict is known.
        self._snapshots.append(self._snapshots.pop(0))
        torch._foreach_copy_(self._snapshots[-1], self._buffers)

    def accepts(
        self, batches: Sequence[Batch], losses: Sequence[Mapping[str, Tensor]], grad_norm: Tensor
    ) -> bool:
        """Return whether to make the optimizer step; call it before each.

        With a lag it returns True and tells the optimizer to skip a bad step on the device.

        Args:
            batches: of the step.
            losses: of each batch.
            grad_norm: norm of the gradient.

        Raises:
            DivergedError: `train.max_bad_steps` steps in a row were bad.
        """
        state = self._state
        values = [loss.detach() for of_batch in losses for loss in of_batch.values()]
        if not state.scaler.is_enabled():
            values.append(grad_norm)
        bad = any_rank(~torch.stack(values).isfinite().all())
        step = _Step(state.epoch + 1, state.steps_done, batches, losses, self._snapshots[-1], bad)
        if self._lag and not state.scaler.is_enabled():
            # As a GradScaler does for fused optimizers.
            state.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        if bad.is_cuda:
            step.bad = torch.empty((), dtype=torch.bool, pin_memory=True)
            step.bad.copy_(bad, non_blocking=True)
            step.copied = torch.cuda.Event()
            step.copied.record()
        self._pending.append(step)
        verdicts = [self._judge() for _ in range(len(self._pending) - self._lag)]
        return bool(self._lag) or verdicts[-1]

    def settle(self) -> None:
        """Wait for all pending verdicts, as before a checkpoint is written."""
        while self._pending:
            self._judge()

    def _judge(self) -> bool:
        """Return whether the oldest pending step was good; undo and report it if not."""
        step, state = self._pending.pop(0), self._state
        if step.copied is not None:
            step.copied.synchronize()
        if not step.bad:
            state.bad_in_a_row = 0
            return True
        state.bad_in_a_row += 1
        torch._foreach_copy_(self._buffers, step.buffers)
        for later in self._pending:  # Their snapshots hold what this step left.
            torch._foreach_copy_(later.buffers, step.buffers)
        self._report(step)
        if state.bad_in_a_row >= state.experiment.train.max_bad_steps:
            raise DivergedError(
                f"epoch {step.epoch}, step {step.number}: {state.bad_in_a_row} steps in a row had "
                "a non-finite loss or gradient; likely causes: learning rate too high (optim.lr), "
                "warm-up too short (optim.warmup_iters), no gradient clipping (optim.clip_norm), "
                f"or the data: see {self._run_dir}/bad_step_*.pt; last.pt is from before these "
                "steps"
            )
        return False

    def _report(self, step: _Step) -> None:
        means = {
            name: sum(of_batch[name].item() for of_batch in step.losses) / len(step.losses)
            for name in step.losses[0]
        }
        finite = torch.tensor(list(means.values())).isfinite().all()
        process = f".process{rank()}" if world_size() > 1 else ""
        path = self._run_dir / f"bad_step_{step.number:06d}{process}.pt"
        image_ids = all_gather_dict({i: None for batch in step.batches for i in batch.image_ids})
        where = ""
        if len(list(self._run_dir.glob("bad_step_*.pt"))) < _MAX_FILES:
            with warn_on_oserror(path):
                _save_batches(path, step)
                where = f"; batch saved to {path}"
        logger.warning(
            "epoch %d, step %d: non-finite %s (%s), step skipped; its images: %s%s",
            step.epoch,
            step.number,
            "gradient" if finite else "loss",
            ", ".join(f"{name} {value:.4g}" for name, value in means.items()),
            ", ".join(image_ids),
            where,
        )


def _save_batches(path: Path, step: _Step) -> None:
    """Write a step's batches as plain data: `torch.load(path, weights_only=True)` reads them."""
    batches = [
        {
            "image_ids": batch.image_ids,
            "images": batch.images.cpu(),
            "targets": [{k: v.cpu() for k, v in target.items()} for target in batch.targets],
            "losses": {name: loss.item() for name, loss in losses.items()},
        }
        for batch, losses in zip(step.batches, step.losses, strict=True)
    ]
    with replacing(path) as temporary:
        write_tensors(temporary, {"epoch": step.epoch, "step": step.number, "batches": batches})
