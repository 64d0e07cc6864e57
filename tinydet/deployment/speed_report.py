"""The speed of a checkpoint: what is timed, on what, and what the user is told about it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tinydet.config import Experiment
from tinydet.deployment.images import random_images, sample_images
from tinydet.deployment.reparameterize import fold_detector
from tinydet.deployment.speed import clock_for, half_precision_problem, measure, table
from tinydet.experiment_file import experiment_from_dict
from tinydet.training.checkpoint import load_detector, read_checkpoint
from tinydet.training.device import pick_device
from tinydet.yolof.detector import Detector

_KEPT_IMAGES = 64  # held on the device and used again and again


@dataclass(frozen=True)
class SpeedOptions:
    """What to time.

    Attributes:
        images: images for each form.
        batch_size: images in a batch.
        size: (H, W) of the input, multiples of 32; None takes the experiment's.
        fp16: run in float16.
        fuse: time the folded form beside the other.
        device: "auto", "cpu", "cuda", "cuda:N".
        time_limit: seconds for the whole measurement; 0 is no limit.
    """

    images: int = 2000
    batch_size: int = 1
    size: tuple[int, int] | None = None
    fp16: bool = False
    fuse: bool = True
    device: str = "auto"
    time_limit: float = 60.0


def time_checkpoint(
    checkpoint: Path, experiment: Experiment | None, options: SpeedOptions
) -> Iterator[str]:
    """Time a checkpoint's detector, yielding what to tell the user line by line.

    Raises:
        ValueError: the checkpoint, the device or an option is wrong.
    """
    _check_options(options)
    device = pick_device(options.device)
    content = read_checkpoint(checkpoint)
    detector = load_detector(checkpoint, experiment)
    experiment = experiment or experiment_from_dict(content["experiment"])
    yield _where(device)
    batches, source = _batches(experiment, options)
    shapes = sorted({(b.shape[-2], b.shape[-1]) for b in batches})
    sizes = " ".join(f"{h}x{w}" for h, w in shapes[:4]) + (" ..." if len(shapes) > 4 else "")
    yield f"input       batches of {options.batch_size}, {sizes}; {source}"
    forms = {}
    if content["form"] == "deploy":
        yield "forms       the checkpoint is folded already: there is no other form to time"
        forms["folded"] = detector
    else:
        if options.fuse:
            forms["folded"] = fold_detector(detector)[0]
        forms["unfolded"] = detector
    batches = [batch.to(device) for batch in batches]
    forms = {name: _placed(form, device) for name, form in forms.items()}
    if options.fp16:
        forms, told = _halved(forms, batches[0])
        yield told
    clock = clock_for(device)
    yield f"timed       forward and post-processing, no data loading; {clock.name}"
    limit = options.time_limit or None
    timings = measure(forms, batches, options.images, clock, limit)
    timed = min(timing.images for timing in timings.values())
    yield from table(timings)
    if timed < options.images:
        yield (
            f"time limit of {options.time_limit:g} s: {timed} of {options.images} images timed "
            "with each form (--time-limit 0 times all)"
        )
    else:
        yield f"{timed} images timed with each form"


def _check_options(options: SpeedOptions) -> None:
    if options.images < 1 or options.batch_size < 1:
        raise ValueError("--images and --batch-size must be at least 1")
    if options.time_limit < 0:
        raise ValueError(f"--time-limit {options.time_limit:g}: give seconds, or 0 for no limit")
    if options.size and (min(options.size) < 32 or any(side % 32 for side in options.size)):
        raise ValueError(
            f"--size {options.size[0]} {options.size[1]}: both must be multiples of 32"
        )


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return f"device      {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"device      CPU, {threads} threads: a wall clock times it (CUDA events need a GPU)"


def _batches(experiment: Experiment, options: SpeedOptions) -> tuple[list[Tensor], str]:
    wanted = min(options.images, max(_KEPT_IMAGES, options.batch_size))
    images = sample_images(experiment, wanted, options.batch_size)
    batches = list(images.batches)
    if images.real:
        # One incomplete batch among full ones would be another measurement.
        full = [batch for batch in batches if len(batch) == options.batch_size]
        batches = full or [batches[0].repeat(options.batch_size, 1, 1, 1)[: options.batch_size]]
    elif options.size:
        batches = [random_images(options.batch_size, options.size)]
    if options.size:
        batches = [_resized(batch, options.size) for batch in batches]
    return batches, images.source


def _resized(batch: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(batch.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _placed(form: Detector, device: torch.device) -> Detector:
    form = form.to(device)
    # What tensor cores want, and what training uses on a GPU.
    return form.to(memory_format=torch.channels_last) if device.type == "cuda" else form


def _halved(forms: dict[str, Detector], images: Tensor) -> tuple[dict[str, Detector], str]:
    halved = {f"{name} float16": copy.deepcopy(form).half() for name, form in forms.items()}
    on_cpu = images.device.type == "cpu"
    for form in halved.values():
        problem = half_precision_problem(form, images)
        if problem:
            device = "this CPU" if on_cpu else str(images.device)
            told = f"precision   float16 cannot run on {device} ({problem}): float32 was timed"
            return {f"{name} float32": form for name, form in forms.items()}, told
    if on_cpu:
        return halved, (
            "precision   float16, on a CPU: it runs, but few CPUs compute in it, and it is mostly "
            "slower than float32; --fp16 is meant for a GPU"
        )
    return halved, "precision   float16"
