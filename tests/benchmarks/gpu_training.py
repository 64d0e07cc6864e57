"""Training on a GPU: its losses beside a CPU's, a kill and a resume, and its speed."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_process import Row
from gpu_sizes import Sizes
from kill_and_resume import last_of
from small_run import Training, small_experiment
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from tinydet.config import Augment, Data, Experiment, Model, Optim, Train
from tinydet.data.shapes import render_shapes
from tinydet.training.loop import train
from tinydet.training.profile import profile_training
from tinydet.yolof.detector import Detector

# Largest relative difference from the CPU's loss. The first step has the same weights; in the next
# ones rounding decides on some matches, and later the runs go their own ways.
_ALLOWED = {1: 1e-4, 10: 2e-2}
_REPORTED = (1, 2, 5, 10, 20, 50)

_DETERMINISTIC = """\
import torch
from tinydet.experiment_file import load_experiment

torch.use_deterministic_algorithms(True, warn_only=True)
experiment = load_experiment({path!r})
"""


def compare_losses(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Train the same steps on the CPU and on the device, in float32; yield their differences.

    Raises:
        RuntimeError: an early step differs by more than rounding.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    model = replace(next(iter(sizes.train_models.values())), feature="C4")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = sizes.loss_steps * sizes.loss_batch
        experiment = _experiment(
            folder, model, images, sizes.loss_pixels, epochs=1, batch_size=sizes.loss_batch
        )
        runs = []
        for where, memory_format in (("cpu", "contiguous"), (str(device), "channels_last")):
            settings = replace(experiment.train, device=where, memory_format=memory_format)
            with _noted_losses() as losses:
                train(replace(experiment, train=settings), folder / f"{where} {memory_format}")
            runs.append([{n: v.item() for n, v in step.items()} for step in losses])
    apart = [
        max(abs(one[n] - two[n]) / abs(one[n]) for n in one) for one, two in zip(*runs, strict=True)
    ]
    for step in [s for s in _REPORTED if s <= len(apart)]:
        yield {
            "step": step,
            "loss on the CPU": float(sum(runs[0][step - 1].values())),
            "loss here": float(sum(runs[1][step - 1].values())),
            "largest relative difference": apart[step - 1],
            "allowed": _ALLOWED.get(step),
        }
    for step, allowed in _ALLOWED.items():
        worst = max(apart[:step])
        if not worst <= allowed:
            raise RuntimeError(f"up to step {step} the losses differ by {worst:.1e}: {allowed:.0e}")


def kill_and_resume(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Kill a training, resume it, and compare its end with that of one that was not killed.

    With deterministic algorithms, where torch has them; its warnings about others are in the
    output.

    Raises:
        RuntimeError: the ends differ.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"epochs": sizes.kill_epochs, "device": str(device), "save_minutes": 0.0}
        experiment = folder / "small.py"
        stored = small_experiment(folder, **settings)
        experiment.write_text(_DETERMINISTIC.format(path=str(stored)))
        seconds = 40 if device.type == "cuda" else 280
        training = Training(folder, experiment, "--work-dir", folder / "whole")
        whole = _run_to_its_end(training, seconds)
        run = folder / "killed"
        training = Training(folder, experiment, "--work-dir", run)
        log = run / "log.jsonl"  # Each step writes a line, then the checkpoint.
        there = training.wait_until(
            lambda: log.is_file() and log.read_bytes().count(b"\n") > 5, seconds
        )
        training.signal(signal.SIGKILL)
        training.end()
        if not there:
            raise RuntimeError("; ".join(training.output()[-5:]))
        step = last_of(run)["steps_done"]
        training = Training(folder, experiment, "--work-dir", run, "--resume")
        resumed = _run_to_its_end(training, seconds)
        one, two = last_of(folder / "whole"), last_of(run)
        print(*whole, *resumed, sep="\n")
    differ = []
    for part in ("model", "raw_model", "optimizer", "scaler", "steps_done", "images_seen"):
        apart = largest_difference(one[part], two[part])
        differ += [part] if apart else []
        yield {
            "of the checkpoint": part,
            "equal": not apart,
            "largest difference": apart,
            "killed after step": step,
            "steps": one["steps_done"],
        }
    if differ:
        raise RuntimeError(f"the resumed run differs in {', '.join(differ)}")


def time_training(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Profile training steps of each model in each dtype, on rendered images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = (sizes.train_steps + 5) * sizes.train_batch
        for backbone, model in sizes.train_models.items():
            for dtype in sizes.train_dtypes:
                settings = {"dtype": dtype, "batch_size": sizes.train_batch, "device": str(device)}
                experiment = _experiment(
                    folder, model, images, sizes.train_pixels, memory_format="auto", **settings
                )
                on_gpu = device.type == "cuda"
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(device)
                profile = profile_training(experiment, sizes.train_steps, sizes.train_turns)
                peak = torch.cuda.max_memory_allocated(device) / 1e6 if on_gpu else None
                yield {
                    "backbone": backbone,
                    "dtype": profile.dtype,
                    "memory format": profile.memory_format,
                    "batch": f"{profile.images} of {profile.size[0]}x{profile.size[1]}",
                    "img/s": profile.images / profile.loop,
                    "loop ms": 1000 * profile.loop,
                    "waiting ms": 1000 * profile.waiting,
                    "bare step ms": 1000 * profile.bare,
                    "loop : bare": profile.loop / profile.bare,
                    **{f"{part} ms": 1000 * s for part, s in profile.parts.items()},
                    "loader img/s": profile.loader,
                    "peak MB": peak,
                }


def largest_difference(one: Any, two: Any) -> float:
    """Return the largest difference of numbers in nested containers; infinite if of others."""
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape:
        apart = (one.double() - two.double()).abs()
        return float(apart.nan_to_num(nan=torch.inf).max()) if len(apart.flatten()) else 0.0
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return max((largest_difference(one[k], two[k]) for k in one), default=0.0)
    if isinstance(one, (list, tuple)) and type(one) is type(two) and len(one) == len(two):
        return max(map(largest_difference, one, two), default=0.0)
    if isinstance(one, (int, float)) and isinstance(two, (int, float)):
        return float(abs(one - two))
    return 0.0 if one is two or (type(one) is type(two) is str and one == two) else torch.inf


def _experiment(folder: Path, model: Model, images: int, pixels: int, **train: Any) -> Experiment:
    """Return an experiment on shapes, which are rendered if they are not there."""
    root = folder / "shapes"
    if not root.is_dir():
        # Half as large: rendering 500 images of 512 pixels takes half a minute.
        render_shapes(root, num_train=images, num_test=8, image_size=max(96, pixels // 2), seed=1)
    settings = Train(dtype="float32", memory_format="channels_last", ema_decay=0.99)
    return Experiment(
        name="gpu",
        model=model,
        data=Data(
            root=str(root),
            source="shapes",
            classes=(),
            image_size=pixels,
            augment=Augment(hflip=0.5),
        ),
        optim=Optim(optimizer="adamw", lr=1e-4, warmup_iters=10, clip_norm=10.0),
        train=replace(settings, **train),
    )


@contextmanager
def _noted_losses() -> Iterator[list[dict[str, Tensor]]]:
    """Note the losses of each training step made within."""
    noted: list[dict[str, Tensor]] = []

    def note(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, Detector) and isinstance(output[0], dict):
            noted.append({name: loss.detach() for name, loss in output[0].items()})

    handle = register_module_forward_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


def _run_to_its_end(training: Training, seconds: float) -> list[str]:
    """Wait for a training and return what it printed.

    Raises:
        RuntimeError: it failed.
    """
    try:
        status = training.end(seconds)
    except subprocess.TimeoutExpired:
        training.signal(signal.SIGKILL)
        raise
    if status:
        raise RuntimeError("; ".join(training.output()[-5:]))
    return training.output()
