"""The speed of a checkpoint: what is timed, on what, and what the user is told about it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tinydet.config import Experiment
from tinydet.deployment.flops import check_size, count
from tinydet.deployment.gemm import gemm_peak
from tinydet.deployment.images import random_images, resize_images, sample_images
from tinydet.deployment.reparameterize import fold_detector, load_folded
from tinydet.deployment.speed import (
    Form,
    Timing,
    clock_for,
    measure,
    precision_problem,
    table,
)
from tinydet.experiment_file import experiment_from_dict
from tinydet.training.checkpoint import load_detector, read_checkpoint
from tinydet.training.device import pick_device
from tinydet.training.results import write_json
from tinydet.yolof.detector import Detector

_KEPT_IMAGES = 64  # held on the device and used again and again
_SSDLITE = "ssdlite320_mobilenet_v3_large"  # torchvision's
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SpeedOptions:
    """What to time.

    Attributes:
        images: images for each form.
        batch_size: images in a batch.
        size: (H, W) of the input, multiples of 32; None takes the experiment's.
        precision: what torch computes in; ONNX files compute in what they were written in.
        channels_last: torch's memory format; None is channels_last on a GPU alone.
        compile: time the compiled form beside the other.
        backend: what runs the checkpoint.
        others: checkpoints, folded for it, ONNX files, and the name of torchvision's SSDLite, to
            time beside it.
        fuse: time the folded form beside the other.
        device: "auto", "cpu", "cuda", "cuda:N".
        time_limit: seconds for the whole measurement; 0 is no limit.
        out: JSON file for the figures; None writes none.
    """

    images: int = 2000
    batch_size: int = 1
    size: tuple[int, int] | None = None
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    channels_last: bool | None = None
    compile: bool = False
    backend: Literal["torch", "onnxruntime", "all"] = "torch"
    others: tuple[Path, ...] = ()
    fuse: bool = True
    device: str = "auto"
    time_limit: float = 60.0
    out: Path | None = None


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
    where = _where(device)
    yield f"device      {where}"
    batches, source = _batches(experiment, options)
    shapes = sorted({(b.shape[-2], b.shape[-1]) for b in batches})
    sizes = " ".join(f"{h}x{w}" for h, w in shapes[:4]) + (" ..." if len(shapes) > 4 else "")
    yield f"input       batches of {options.batch_size}, {sizes}; {source}"

    detectors = {}
    if content["form"] == "deploy":
        yield "forms       the checkpoint is folded already: there is no other form to time"
        detectors["folded"] = detector
    else:
        if options.fuse:
            yield f"folding     {checkpoint}"
            detectors["folded"] = fold_detector(detector)[0]
        detectors["unfolded"] = detector
    for path in options.others:
        if path.suffix == ".pt":
            yield f"folding     {path}"
            detectors[str(path)] = load_folded(path)
    operations = {name: _operations(form, batches) for name, form in detectors.items()}
    forms: dict[str, Form] = {}
    if options.backend != "onnxruntime":
        placed, told = _placed(detectors, batches[0], device, options)
        forms.update(placed)
        yield f"precision   {told}"
    if options.backend != "torch" or any(path.suffix != ".pt" for path in options.others):
        exported, told = _onnx_forms(detectors, experiment, device, options, operations)
        forms.update(exported)
        yield f"onnxruntime {told}"
    counted = {name: operations.get(name.split(" (")[0], 0.0) for name in forms}

    peak_dtype = _DTYPES.get(options.precision, torch.float32)
    peak = gemm_peak(device, peak_dtype)
    yield f"peak        {peak / 1e9:.0f} GFLOP/s in a large {options.precision} matrix product"
    clock = clock_for(device)
    yield f"timed       forward and post-processing, no data loading; {clock.name}"
    batches = [batch.to(device) for batch in batches]
    _see_all_shapes(forms, batches)
    limit = options.time_limit or None
    timings = measure(forms, batches, options.images, clock, limit)
    timed = min(timing.images for timing in timings.values())
    yield from table(timings, counted, peak)
    if timed < options.images:
        yield (
            f"time limit of {options.time_limit:g} s: {timed} of {options.images} images timed "
            "with each form (--time-limit 0 times all)"
        )
    else:
        yield f"{timed} images timed with each form"
    if options.out:
        figures = {
            "checkpoint": str(checkpoint),
            "device": where,
            "images": source,
            "sizes": shapes,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "peak_gflops": peak / 1e9,
            "forms": {name: _figures(timings[name], counted[name]) for name in timings},
        }
        write_json(options.out, figures)
        yield f"wrote       {options.out}"


def _check_options(options: SpeedOptions) -> None:
    if options.images < 1 or options.batch_size < 1:
        raise ValueError("--images and --batch-size must be at least 1")
    if options.time_limit < 0:
        raise ValueError(f"--time-limit {options.time_limit:g}: give seconds, or 0 for no limit")
    if options.size:
        check_size("--size", options.size)
    for path in options.others:
        if path.suffix not in (".pt", ".onnx") and str(path) != _SSDLITE:
            raise ValueError(f"--beside {path}: give a .pt or .onnx file, or {_SSDLITE}")
    if options.out and not options.out.parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} threads: a wall clock times it (CUDA events need a GPU)"


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
        batches = [resize_images(batch, options.size) for batch in batches]
    return batches, images.source


def _operations(detector: Detector, batches: Sequence[Tensor]) -> float:
    """Return the operations of an image, on average: two for each multiply-add."""
    of_shape = {tuple(batch.shape): batch for batch in batches}
    adds = {shape: count(detector, batch).multiply_adds for shape, batch in of_shape.items()}
    return 2 * sum(adds[tuple(batch.shape)] for batch in batches) / sum(map(len, batches))


def _placed(
    detectors: Mapping[str, Detector], images: Tensor, device: torch.device, options: SpeedOptions
) -> tuple[dict[str, Form], str]:
    """Return the detectors as torch is to run them, and what that is in words."""
    last = device.type == "cuda" if options.channels_last is None else options.channels_last
    memory_format = torch.channels_last if last else torch.contiguous_format
    placed = {
        name: copy.deepcopy(detector).to(device).to(memory_format=memory_format)
        for name, detector in detectors.items()
    }
    layout = ", channels_last" if last else ""
    precision, told = options.precision, options.precision
    if precision != "float32":
        halved = {name: copy.deepcopy(f).to(_DTYPES[precision]) for name, f in placed.items()}
        problems = [precision_problem(form, images.to(device)) for form in halved.values()]
        problem = next(filter(None, problems), None)
        if problem:
            where = "this CPU" if device.type == "cpu" else str(device)
            told = f"{precision} cannot run on {where} ({problem}): float32 was timed"
            precision = "float32"
        else:
            placed = halved
            if device.type == "cpu":
                told += (
                    ", on a CPU: it runs, but few CPUs compute in it, and it can be slower than "
                    "float32"
                )
    forms: dict[str, Form] = {
        f"{name} ({precision}{layout})": form for name, form in placed.items()
    }
    if options.compile:
        for name, form in placed.items():
            compiled = copy.deepcopy(form)
            compiled.compile()
            forms[f"{name} ({precision}{layout}, compiled)"] = compiled
    return forms, told + layout


def _onnx_forms(
    detectors: Mapping[str, Detector],
    experiment: Experiment,
    device: torch.device,
    options: SpeedOptions,
    operations: dict[str, float],
) -> tuple[dict[str, Form], str]:
    """Return the folded detectors exported, and the ONNX files, and what they run in.

    The operations of a peer are added to `operations`.
    """
    # Here alone: without them torch is timed without onnxruntime being installed.
    from tinydet.deployment.onnx import export_detector
    from tinydet.deployment.onnx_form import OnnxForm
    from tinydet.deployment.peers import ssdlite

    if device.type != "cpu":
        raise ValueError("ONNX files are timed on a CPU: --device cpu, or --backend torch")
    threads = torch.get_num_threads()
    forms: dict[str, Form] = {}
    if options.backend != "torch":
        for name, detector in detectors.items():
            if name == "unfolded" and "folded" in detectors:
                continue  # Nobody would ship it.
            model = export_detector(detector, experiment.data, options.size)
            forms[f"{name} (ONNX)"] = OnnxForm(model, threads)
    for path in options.others:
        if path.suffix == ".onnx":
            forms[str(path)] = OnnxForm(path, threads)
        elif str(path) == _SSDLITE:
            if options.size is None:
                raise ValueError(f"{_SSDLITE} needs --size H W: its boxes are made for one size")
            model, network = ssdlite(options.size, experiment.model)
            operations[_SSDLITE] = 2 * count(network, random_images(1, options.size)).multiply_adds
            forms[f"{_SSDLITE} (ONNX)"] = OnnxForm(model, threads)
    return forms, f"CPU, {threads} threads; a file computes in what it was written in"


def _see_all_shapes(forms: Mapping[str, Form], batches: Sequence[Tensor]) -> None:
    """Run each form on each shape: compiling and planning memory are no part of the time."""
    shapes = {tuple(batch.shape): batch for batch in batches}
    with torch.inference_mode():
        for form in forms.values():
            for batch in shapes.values():
                form.select(*form(batch), (batch.shape[-2], batch.shape[-1]))


def _figures(timing: Timing, operations: float) -> dict[str, float]:
    return {
        "images": timing.images,
        "images_per_second": timing.images_per_second,
        "median_ms": timing.median,
        "p95_ms": timing.p95,
        "spread_ms": timing.spread,
        "forward_ms": timing.forward,
        "postprocessing_ms": timing.postprocessing,
        "gflops": operations * timing.images_per_second / 1e9,
    }
