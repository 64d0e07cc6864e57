"""The speed of a checkpoint: which forms are timed, on what, and the report about it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tinydet.atomic import check_out
from tinydet.config import Experiment
from tinydet.deployment.flops import check_size, count
from tinydet.deployment.fold_checkpoint import fold_detector, folded_detector
from tinydet.deployment.images import random_images, resize_images, sample_images
from tinydet.deployment.timer import Candidate, Timing, clock_for, measure, peak_flops
from tinydet.report.table import text_table
from tinydet.training.checkpoint import load_checkpoint
from tinydet.training.device import describe_device, pick_device
from tinydet.training.results import write_json
from tinydet.yolof.detector import Detector

Precision = Literal["float32", "float16", "bfloat16"]

_KEPT_IMAGES = 64  # held on the device and timed again and again
_SSDLITE = "ssdlite320_mobilenet_v3_large"  # torchvision's
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def time_checkpoint(
    checkpoint: Path,
    experiment: Experiment | None = None,
    *,
    images: int = 2000,
    batch_size: int = 1,
    size: tuple[int, int] | None = None,
    precision: Precision = "float32",
    channels_last: bool | None = None,
    compile: bool = False,
    backend: Literal["torch", "onnxruntime", "all"] = "torch",
    beside: Sequence[Path] = (),
    fuse: bool = True,
    device: str = "auto",
    time_limit: float = 60.0,
    out: Path | None = None,
) -> Iterator[str]:
    """Time a checkpoint's detector, yielding the report line by line.

    Args:
        checkpoint: of either form.
        experiment: replaces the stored one.
        images: number of images to time with each candidate.
        batch_size: images in a batch.
        size: (H, W) of the input, multiples of 32; None is the experiment's.
        precision: torch's; ONNX files run in the precision they were written in.
        channels_last: torch's memory format; None is channels_last with CUDA only.
        compile: also time the detectors compiled by torch.compile.
        backend: what runs the checkpoint.
        beside: other checkpoints (timed folded), ONNX files, and the name of torchvision's SSDLite.
        fuse: also time the folded form.
        device: "auto", "cpu", "cuda", "cuda:N", "mps".
        time_limit: seconds for the whole measurement; 0 is no limit.
        out: JSON file for the figures.

    Raises:
        ValueError: the checkpoint, the device or an option is wrong.
    """
    _check_options(images, batch_size, size, beside, time_limit)
    check_out(out, [checkpoint, *beside])
    for_torch = {
        f"--{'fp16' if precision == 'float16' else 'bf16'}": precision != "float32",
        "--channels-last": channels_last is not None,
        "--compile": compile,
    }
    if backend == "onnxruntime" and any(for_torch.values()):
        option = next(name for name, wanted in for_torch.items() if wanted)
        raise ValueError(f"{option}: is for torch; leave it out, or --backend all")
    place = pick_device(device)
    loaded = load_checkpoint(checkpoint, experiment)
    experiment = loaded.experiment
    where = describe_device(place)
    yield f"device      {where}"
    batches, source = _batches(experiment, images, batch_size, size)
    shapes = sorted({(b.shape[-2], b.shape[-1]) for b in batches})
    sizes = " ".join(f"{h}x{w}" for h, w in shapes[:4]) + (" ..." if len(shapes) > 4 else "")
    yield f"input       batches of {batch_size}, {sizes}; {source}"

    detectors = {}
    if loaded.folded:
        yield "forms       the checkpoint is folded already: there is no other form to time"
        detectors["folded"] = loaded.detector
    else:
        if fuse:
            yield f"folding     {checkpoint}"
            detectors["folded"] = fold_detector(loaded.detector)[0]
        detectors["unfolded"] = loaded.detector
    for path in beside:
        if path.suffix == ".pt":
            yield f"folding     {path}"
            detectors[str(path)] = folded_detector(load_checkpoint(path))
    operations = {name: _operations(detector, batches) for name, detector in detectors.items()}
    candidates: dict[str, Candidate] = {}
    if backend != "onnxruntime":
        last = place.type == "cuda" if channels_last is None else channels_last
        placed, precision, note = _place(detectors, batches[0], place, precision, last, compile)
        candidates.update(placed)
        yield f"precision   {note}"
    if backend != "torch" or any(path.suffix != ".pt" for path in beside):
        if place.type != "cpu":
            raise ValueError("ONNX files are timed on a CPU: --device cpu, or --backend torch")
        exported = detectors if backend != "torch" else {}
        candidates.update(_onnx_candidates(exported, beside, experiment, size, operations))
        threads = torch.get_num_threads()
        yield f"onnxruntime CPU, {threads} threads; a file runs in the precision it was written in"
    counted = {name: operations.get(name.split(" (")[0], 0.0) for name in candidates}

    peak = peak_flops(place, _DTYPES[precision])
    yield f"peak        {peak / 1e9:.0f} GFLOP/s in a large {precision} matrix product"
    yield f"timed       forward and post-processing, no data loading; {clock_for(place).name}"
    batches = [batch.to(place) for batch in batches]
    _run_all_shapes(candidates, batches)
    timings = measure(candidates, batches, images, time_limit or None)
    timed = min(timing.images for timing in timings.values())
    yield from table(timings, counted, peak)
    if timed < images:
        yield (
            f"time limit of {time_limit:g} s: {timed} of {images} images timed with each candidate "
            "(--time-limit 0 times all)"
        )
    else:
        yield f"{timed} images timed with each candidate"
    if out:
        figures = {
            "checkpoint": str(checkpoint),
            "device": where,
            "images": source,
            "sizes": shapes,
            "batch_size": batch_size,
            "precision": precision,
            "peak_gflops": peak / 1e9,
            "forms": {name: _figures(timings[name], counted[name]) for name in timings},
        }
        write_json(out, figures)
        yield f"wrote       {out}"


def table(timings: Mapping[str, Timing], operations: Mapping[str, float], peak: float) -> list[str]:
    """Return the times as lines of text.

    Args:
        timings: by the name of the candidate.
        operations: per image, where they are known; a multiply-add is two.
        peak: operations per second that the machine is capable of.
    """
    header = ["", "img/s", "median ms", "p95 ms", "spread ms", "forward ms", "post ms"]
    header += ["G mult-adds", "GFLOP/s", "of peak"]
    rows = []
    for name, t in timings.items():
        milliseconds = (t.median, t.p95, t.spread, t.forward, t.postprocessing)
        row = [name, f"{t.images_per_second:.1f}", *(f"{ms:.2f}" for ms in milliseconds)]
        reached = operations.get(name, 0) * t.images_per_second
        if reached:
            row += [
                f"{operations[name] / 2e9:.2f}",
                f"{reached / 1e9:.1f}",
                f"{reached / peak:.0%}",
            ]
        else:
            row += ["-"] * 3
        rows.append(row)
    return text_table(header, rows)


def _check_options(
    images: int,
    batch_size: int,
    size: tuple[int, int] | None,
    beside: Sequence[Path],
    time_limit: float,
) -> None:
    if images < 1 or batch_size < 1:
        raise ValueError("--images and --batch-size must be at least 1")
    if time_limit < 0:
        raise ValueError(f"--time-limit {time_limit:g}: give seconds, or 0 for no limit")
    if size:
        check_size("--size", size)
    for path in beside:
        if path.suffix not in (".pt", ".onnx") and str(path) != _SSDLITE:
            raise ValueError(f"--beside {path}: give a .pt or .onnx file, or {_SSDLITE}")


def _batches(
    experiment: Experiment, images: int, batch_size: int, size: tuple[int, int] | None
) -> tuple[list[Tensor], str]:
    sample = sample_images(experiment, min(images, max(_KEPT_IMAGES, batch_size)), batch_size)
    batches = list(sample.batches)
    if sample.real:
        # A smaller last batch would be a different measurement.
        full = [batch for batch in batches if len(batch) == batch_size]
        batches = full or [batches[0].repeat(batch_size, 1, 1, 1)[:batch_size]]
    elif size:
        batches = [random_images(batch_size, size)]
    if size:
        batches = [resize_images(batch, size) for batch in batches]
    return batches, sample.source


def _operations(detector: Detector, batches: Sequence[Tensor]) -> float:
    """Return the average operations per image: two for each multiply-add."""
    of_shape = {tuple(batch.shape): batch for batch in batches}
    adds = {shape: count(detector, batch).multiply_adds for shape, batch in of_shape.items()}
    return 2 * sum(adds[tuple(batch.shape)] for batch in batches) / sum(map(len, batches))


def _place(
    detectors: Mapping[str, Detector],
    images: Tensor,
    device: torch.device,
    precision: Precision,
    channels_last: bool,
    compile: bool,
) -> tuple[dict[str, Candidate], Precision, str]:
    """Return the detectors as torch will run them, in which precision, and a description."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    layout = ", channels_last" if channels_last else ""
    placed = {
        name: copy.deepcopy(detector).to(device).to(memory_format=memory_format)
        for name, detector in detectors.items()
    }
    note: str = precision
    if precision != "float32":
        halved = {n: copy.deepcopy(d).to(_DTYPES[precision]) for n, d in placed.items()}
        problems = [precision_problem(detector, images.to(device)) for detector in halved.values()]
        problem = next(filter(None, problems), None)
        if problem:
            where = "this CPU" if device.type == "cpu" else str(device)
            note = f"{precision} cannot run on {where} ({problem}): float32 was timed"
            precision = "float32"
        else:
            placed = halved
            if device.type == "cpu":
                note += " on a CPU; without hardware support it can be slower than float32"
    candidates: dict[str, Candidate] = {
        f"{name} ({precision}{layout})": detector for name, detector in placed.items()
    }
    if compile:
        for name, detector in placed.items():
            compiled = copy.deepcopy(detector)
            compiled.compile()
            candidates[f"{name} ({precision}{layout}, compiled)"] = compiled
    return candidates, precision, note + layout


def precision_problem(detector: Detector, images: Tensor) -> str | None:
    """Return why a detector in half precision cannot run on its device, or None if it can."""
    try:
        with torch.inference_mode():
            detector(images)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _onnx_candidates(
    detectors: Mapping[str, Detector],
    beside: Sequence[Path],
    experiment: Experiment,
    size: tuple[int, int] | None,
    operations: dict[str, float],
) -> dict[str, Candidate]:
    """Return the folded detectors exported, and the ONNX files beside them.

    The operations of SSDLite are added to `operations`.
    """
    # Imported here so that torch can be timed without onnxruntime being installed.
    from tinydet.deployment.onnx import export_detector
    from tinydet.deployment.onnx_detector import SplitOnnxDetector
    from tinydet.deployment.ssdlite_baseline import ssdlite

    threads = torch.get_num_threads()
    candidates: dict[str, Candidate] = {}
    for name, detector in detectors.items():
        if name == "unfolded" and "folded" in detectors:
            continue  # Nobody would deploy it.
        model = export_detector(detector, experiment.data, size)
        candidates[f"{name} (ONNX)"] = SplitOnnxDetector(model, threads)
    for path in beside:
        if path.suffix == ".onnx":
            candidates[str(path)] = SplitOnnxDetector(path, threads)
        elif str(path) == _SSDLITE:
            if size is None:
                raise ValueError(f"{_SSDLITE} needs --size H W: its boxes are made for one size")
            model, network = ssdlite(size, experiment.model)
            operations[_SSDLITE] = 2 * count(network, random_images(1, size)).multiply_adds
            candidates[f"{_SSDLITE} (ONNX)"] = SplitOnnxDetector(model, threads)
    return candidates


def _run_all_shapes(candidates: Mapping[str, Candidate], batches: Sequence[Tensor]) -> None:
    """Run each candidate on each shape, so that compiling and memory planning are not timed."""
    shapes = {tuple(batch.shape): batch for batch in batches}
    with torch.inference_mode():
        for name, candidate in candidates.items():
            for batch in shapes.values():
                try:
                    outputs = candidate(batch)
                except ValueError as error:  # A file of a smaller, fixed size.
                    raise ValueError(f"{name}: {error}") from error
                candidate.select(*outputs, (batch.shape[-2], batch.shape[-1]))


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
