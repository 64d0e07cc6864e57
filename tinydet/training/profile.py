"""Where the time of a training step goes: the whole loop beside the bare step.

The bare step is forward, losses, backward and optimizer on one batch in memory. The rest of the
loop is waiting for data, copying it, averaged weights, checks and the log.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise
from pathlib import Path
from typing import cast

import torch

from tinydet.config import Experiment
from tinydet.data.loader import DetectionLoader
from tinydet.data.sample import Batch
from tinydet.training.device import pick_device, synchronize
from tinydet.training.log import RunLog
from tinydet.training.loop import prepare, train_epoch
from tinydet.training.nonfinite import NonFiniteGuard
from tinydet.training.runs import Saver
from tinydet.training.signals import Signals
from tinydet.training.state import TrainingState

_WARM_UP = 4  # untimed steps of a turn, in which prefetched batches are used up
_PARTS = ("forward", "losses", "backward", "optimizer")


@dataclass(frozen=True)
class StepTime:
    """Time of a step of the whole loop, of one batch.

    Attributes:
        seconds: the median.
        steps_an_epoch: batches in an epoch.
        dtype: with "auto" resolved.
        memory_format: with "auto" resolved.
    """

    seconds: float
    steps_an_epoch: int
    dtype: str
    memory_format: str


def time_steps(experiment: Experiment, steps: int = 20) -> StepTime:
    """Train a few steps, discard them, and return the time of one, including its data.

    Args:
        experiment: what is trained.
        steps: how many are timed.

    Raises:
        ConfigError: a field of the experiment cannot be met.
    """
    device = pick_device(experiment.train.device)
    # Steps are timed batch by batch.
    experiment = replace(experiment, train=replace(experiment.train, accumulate=1))
    state, loader, _, _ = prepare(experiment, device)
    warm_up = min(_WARM_UP, len(loader) // 2)
    part = _Part(loader, min(len(loader), warm_up + steps), device)
    loop_loader = cast(DetectionLoader, part)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        guard, saver = NonFiniteGuard(state, Path(folder)), Saver(Path(folder), state)
        for epoch in count():
            state.epoch, state.step = epoch, 0
            with RunLog(Path(folder), 0, part.number) as log:
                train_epoch(state, loop_loader, device, log, guard, saver, Signals())
            seconds += part.steps[warm_up:]
            if len(seconds) >= steps:
                break
    precision = state.precision
    return StepTime(
        statistics.median(seconds), len(loader), precision.dtype, precision.memory_format
    )


@dataclass(frozen=True)
class Profile:
    """Where the time of a training step goes; all times are medians, in seconds.

    Attributes:
        turns: of the loop and the bare step.
        steps: timed in each turn.
        images: in a batch.
        size: (H, W) of the bare step's images.
        loop: a step of the whole loop.
        waiting: the part of it that waits for data.
        bare: the bare step.
        parts: of the bare step: forward, losses, backward, optimizer.
        loader: images per second of the loader by itself.
        workers: processes of the loader.
        dtype: with "auto" resolved.
        memory_format: with "auto" resolved.
    """

    turns: int
    steps: int
    images: int
    size: tuple[int, int]
    loop: float
    waiting: float
    bare: float
    parts: dict[str, float]
    loader: float
    workers: int
    dtype: str
    memory_format: str

    def lines(self) -> list[str]:
        """Return the profile as lines of text."""
        processes = f"{self.workers} process{'' if self.workers == 1 else 'es'}"
        return [
            f"profile     {self.turns} turns of {self.steps} steps, {self.images} images a batch; "
            f"bare step on {self.size[0]}x{self.size[1]} pixels",
            f"loop        {1000 * self.loop:.1f} ms per step, {self.images / self.loop:.1f} img/s, "
            f"{self.loop / self.bare:.3f} times the bare step",
            f"waiting     {1000 * self.waiting:.1f} ms of it, for data",
            f"bare step   {1000 * self.bare:.1f} ms",
            *(
                f"  {name:9} {1000 * seconds:.1f} ms, {seconds / self.bare:.0%}"
                for name, seconds in self.parts.items()
            ),
            f"loader      {self.loader:.0f} img/s by itself, with {processes}"
            + ("" if self.workers else ", in this one"),
        ]


def profile_training(experiment: Experiment, steps: int = 20, turns: int = 5) -> Profile:
    """Train a few steps, discard them, and return where their time went.

    Args:
        experiment: what is trained.
        steps: timed in each turn.
        turns: that the loop and the bare step take.

    Raises:
        ConfigError: a field of the experiment cannot be met.
        ValueError: an epoch has fewer steps than a turn.
    """
    device = pick_device(experiment.train.device)
    # Steps are timed batch by batch.
    experiment = replace(experiment, train=replace(experiment.train, accumulate=1))
    state, loader, _, _ = prepare(experiment, device)
    if len(loader) < _WARM_UP + steps:
        raise ValueError(
            f"--profile: an epoch has {len(loader)} steps and {_WARM_UP + steps} are needed; use "
            "more images or a smaller train.batch_size"
        )
    part = _Part(loader, _WARM_UP + steps, device)
    batch = next(iter(loader)).to(device)
    loop_loader = cast(DetectionLoader, part)
    loop: list[float] = []
    waits: list[float] = []
    bare: dict[str, list[float]] = {name: [] for name in _PARTS}
    with tempfile.TemporaryDirectory() as folder:
        guard, saver = NonFiniteGuard(state, Path(folder)), Saver(Path(folder), state)
        for epoch in range(turns):
            state.epoch, state.step = epoch, 0
            with RunLog(Path(folder), 0, _WARM_UP + steps) as log:
                train_epoch(state, loop_loader, device, log, guard, saver, Signals())
            loop += part.steps[_WARM_UP:]
            waits += part.waits[_WARM_UP:]
            parts = [_bare_step(state, batch, device) for _ in range(_WARM_UP + steps)]
            for name in _PARTS:
                bare[name] += [part_seconds[name] for part_seconds in parts[_WARM_UP:]]
    totals = [sum(parts_of_step) for parts_of_step in zip(*bare.values(), strict=True)]
    return Profile(
        turns=turns,
        steps=steps,
        images=len(batch),
        size=(batch.images.shape[-2], batch.images.shape[-1]),
        loop=statistics.median(loop),
        waiting=statistics.median(waits),
        bare=statistics.median(totals),
        parts={name: statistics.median(times) for name, times in bare.items()},
        loader=_loader_alone(loader, turns, steps),
        workers=loader.num_workers,
        dtype=state.precision.dtype,
        memory_format=state.precision.memory_format,
    )


class _Part:
    """The first batches of each epoch of a loader; measures each step and each wait for data."""

    def __init__(self, loader: DetectionLoader, number: int, device: torch.device) -> None:
        self._loader = loader
        self.number = number
        self._device = device
        self.steps: list[float] = []
        self.waits: list[float] = []

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._loader.set_epoch(epoch, start)

    def __iter__(self) -> Iterator[Batch]:
        self.steps, self.waits = [], []
        batches = islice(self._loader, self.number)
        begin = time.perf_counter()
        for batch in batches:
            arrived = time.perf_counter()
            self.waits.append(arrived - begin)
            yield batch
            end = _now(self._device)
            self.steps.append(end - begin)
            begin = end


def _bare_step(state: TrainingState, batch: Batch, device: torch.device) -> dict[str, float]:
    """Make a step and return the seconds of its parts."""
    detector, times = state.detector, [_now(device)]
    with state.precision.autocast(device):
        images = batch.images.contiguous(memory_format=state.precision.torch_format)
        logits, deltas = detector(images)
    times.append(_now(device))
    height, width = images.shape[-2:]
    losses, _ = detector.losses(logits, deltas, (height, width), batch.targets)
    times.append(_now(device))
    state.scaler.scale(losses["loss_cls"] + losses["loss_box"]).backward()
    times.append(_now(device))
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    times.append(_now(device))
    return {name: end - start for name, (start, end) in zip(_PARTS, pairwise(times), strict=True)}


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _loader_alone(loader: DetectionLoader, epoch: int, number: int) -> float:
    """Return the images per second that the loader gives if nothing else is done."""
    loader.set_epoch(epoch)
    images, start = 0, 0.0
    for i, batch in enumerate(loader):
        if i == _WARM_UP:
            start = time.perf_counter()
        elif i > _WARM_UP:
            images += len(batch)
        if i == _WARM_UP + number - 1:
            break
    return images / (time.perf_counter() - start)
