"""Inference on a GPU: forward passes, compiled ones, ONNX Runtime, and the selection of boxes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torchvision
from gpu_process import Row
from gpu_sizes import Sizes
from random_weights import randomise, settle_norms
from timm_models import build_model, example_images
from torch import Tensor, nn

from tinydet.config import VOC_CLASSES, Data, Model
from tinydet.deployment.agreement import Agreement, compare_detections, scores_and_boxes
from tinydet.deployment.fold_checkpoint import fold_detector
from tinydet.deployment.images import random_images
from tinydet.deployment.timer import Candidate, clock_for, measure
from tinydet.reparam import fold
from tinydet.yolof.build import build_detector
from tinydet.yolof.detector import Detector

_SETTLED = 64  # side in pixels of the images that the norms' statistics are drawn for
_SECONDS = 10.0  # after which the candidates of a row take no further turn
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class _Forward:
    """A network on its own input, as a candidate to time: nothing is selected."""

    network: nn.Module
    images: Tensor

    def __call__(self, images: Tensor) -> tuple[Any, Any]:
        del images
        return self.network(self.images), None

    def select(self, cls_logits: Any, deltas: Any, image_size: tuple[int, int]) -> None:
        del cls_logits, deltas, image_size


def time_forward(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Time each network unfolded and folded in each dtype and memory format, in turns."""
    torch.backends.cudnn.benchmark = True
    for name in (*sizes.networks, "YOLOF"):
        forms = _detector_forms(sizes.detector) if name == "YOLOF" else _forms(name)
        pixels = sizes.detector_pixels if name == "YOLOF" else sizes.pixels
        title = f"YOLOF, {sizes.detector.backbone}" if name == "YOLOF" else name
        for batch in sizes.batches:
            candidates: dict[tuple[str, ...], _Forward] = {}
            for key in product(forms, sizes.dtypes, _FORMATS):
                form, dtype, layout = key
                candidates[key] = _placed(forms[form], batch, pixels, device, dtype, layout)
            times = _times(candidates, batch, sizes.runs, device)
            for (form, dtype, layout), figures in times.items():
                yield {
                    "network": f"{title}, {pixels}x{pixels}",
                    "batch": batch,
                    "form": form,
                    "dtype": dtype,
                    "memory format": layout,
                    **figures,
                }


def time_compiled(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Time networks eager and compiled by torch.compile, in the last dtype, channels_last."""
    torch.backends.cudnn.benchmark = True
    if not sizes.compiled:
        yield {"network": "left out in small"}
    dtype, batch = sizes.dtypes[-1], max(sizes.batches)
    for name in sizes.compiled:
        candidates, seconds = {}, {}
        for form, network in _forms(name).items():
            eager = _placed(network, batch, sizes.pixels, device, dtype, "channels_last")
            compiled = _Forward(copy.deepcopy(eager.network), eager.images)
            compiled.network.compile()
            start = time.monotonic()
            with torch.inference_mode():
                compiled(eager.images)
            seconds[form] = time.monotonic() - start
            candidates[form, "eager"], candidates[form, "compiled"] = eager, compiled
        for (form, how), figures in _times(candidates, batch, sizes.runs, device).items():
            first = seconds[form] if how == "compiled" else None
            of_row = {"network": name, "batch": batch, "form": form, "how": how, "dtype": dtype}
            yield {**of_row, **figures, "first call s": first}


def run_onnxruntime(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Run a folded detector in torch and in ONNX Runtime on the device, if it can.

    Raises:
        RuntimeError: they find other objects.
    """
    try:
        import onnxruntime

        from tinydet.deployment.onnx import export_detector
        from tinydet.deployment.onnx_detector import OnnxDetector, SplitOnnxDetector
    except ImportError as error:
        yield {"runtime": f"ONNX Runtime: not installed ({error})"}
        return
    version, providers = onnxruntime.__version__, onnxruntime.get_available_providers()
    if device.type == "cuda" and "CUDAExecutionProvider" not in providers:
        yield {"runtime": f"ONNX Runtime {version} has no CUDA provider: {', '.join(providers)}"}
        return
    torch.backends.cudnn.allow_tf32 = False  # ONNX Runtime's convolutions are compared with.
    folded = _detector_forms(sizes.detector)["folded"]
    model = export_detector(folded, Data(image_size=sizes.detector_pixels))
    folded = folded.to(device)
    split = SplitOnnxDetector(model, device=device.type)
    size = (sizes.detector_pixels, sizes.detector_pixels)
    for batch in sizes.batches:
        images = random_images(batch, size)
        for name, candidate, on in (("torch", folded, device), (f"ORT {version}", split, "cpu")):
            timing = measure({"": candidate}, [images.to(on)], batch * sizes.runs, _SECONDS)[""]
            yield {
                "runtime": name,
                "batch": batch,
                "median ms": timing.median,
                "of it selection ms": timing.postprocessing,
                "img/s": timing.images_per_second,
            }
    found = OnnxDetector(model, device.type).detect(images)
    yield _agreement(folded, folded.detect(images.to(device)), found, images.to(device))


def time_selection(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Compare selected detections with the CPU's, and tell the selection's share of the time.

    Raises:
        RuntimeError: they differ, or torchvision has no NMS for the device.
    """
    key = "CUDA" if device.type == "cuda" else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", key):
        raise RuntimeError(f"torchvision {torchvision.__version__} has no NMS for {key}")
    detector = _detector_forms(sizes.detector)["unfolded"].to(device)
    size = (sizes.detector_pixels, sizes.detector_pixels)
    for batch in sizes.batches:
        images = random_images(batch, size).to(device)
        timing = measure({"": detector}, [images], batch * sizes.runs, _SECONDS)[""]
        with torch.inference_mode():
            alone = _nms_ms(detector, images, sizes.runs)
        yield {
            "batch": batch,
            "forward ms": timing.forward,
            "selection ms": timing.postprocessing,
            "selection's share": timing.postprocessing / timing.median,
            "NMS of one image ms": alone,
        }
    with torch.inference_mode():
        outputs = detector(images)
        found = detector.select(*outputs, size)
        expected = detector.cpu().select(*(x.cpu() for x in outputs), size)
    yield _agreement(detector, expected, found, images.cpu())


def _agreement(detector: Detector, one: Any, two: Any, images: Tensor) -> Row:
    with torch.inference_mode():
        raw = scores_and_boxes(detector, images)
    agreement: Agreement = compare_detections(one, two, detector.config, [raw, raw])
    if not agreement.same or not agreement.matched:
        raise RuntimeError(f"detections: {agreement.line()}")
    return {"agreement": agreement.line()}


def _nms_ms(detector: Detector, images: Tensor, runs: int) -> float:
    """Return the milliseconds of NMS alone on the candidates of the first image."""
    scores, boxes = scores_and_boxes(detector, images[:1])
    best, pairs = scores[0].flatten().topk(min(detector.config.candidates, scores.numel()))
    chosen = boxes[0][pairs // scores.shape[2]].double()
    clock = clock_for(images.device)
    marks = []
    for _ in range(runs + 1):
        start = clock.mark()
        torchvision.ops.nms(chosen, best.double(), detector.config.nms_iou)
        marks.append((start, clock.mark()))
    clock.wait()
    return statistics.median(clock.elapsed(*pair) for pair in marks[1:])


def _forms(name: str) -> dict[str, nn.Module]:
    """Return one of timm's networks with random weights in both forms, on the CPU."""
    model = build_model(name)
    settle_norms(model, example_images(name, 2, _SETTLED, _SETTLED), seed=0)
    return {"unfolded": model, "folded": fold(model, example_images(name, 1, 64, 64))[0]}


def _detector_forms(config: Model) -> dict[str, Detector]:
    """Return a detector that finds things in noise in both forms, on the CPU."""
    torch.manual_seed(0)
    detector = build_detector(config, VOC_CLASSES).eval()
    randomise(detector, seed=0)
    settle_norms(detector, random_images(2, (_SETTLED, _SETTLED)), seed=0)
    return {"unfolded": detector, "folded": fold_detector(detector)[0]}


def _placed(
    network: nn.Module, batch: int, pixels: int, device: torch.device, dtype: str, layout: str
) -> _Forward:
    kind, memory_format = getattr(torch, dtype), _FORMATS[layout]
    network = copy.deepcopy(network).to(device, kind).to(memory_format=memory_format)
    images = random_images(batch, (pixels, pixels)).to(device)
    if not isinstance(network, Detector):  # A detector takes the pixels themselves.
        images = (images.to(kind) - 128) / 64
    return _Forward(network, images.contiguous(memory_format=memory_format))


def _times(
    candidates: Mapping[tuple[str, ...], _Forward], batch: int, runs: int, device: torch.device
) -> dict[tuple[str, ...], Row]:
    """Time candidates in turns; return the figures of each."""
    named: dict[str, Candidate] = {" ".join(key): c for key, c in candidates.items()}
    counted: Sequence[Tensor] = [torch.empty(batch, 3, 1, 1, device=device)]
    timings = measure(named, counted, batch * runs, _SECONDS)
    return {
        key: {
            "median ms": timings[" ".join(key)].median,
            "p95 ms": timings[" ".join(key)].p95,
            "img/s": timings[" ".join(key)].images_per_second,
            "peak MB": _peak_mb(candidate, device),
        }
        for key, candidate in candidates.items()
    }


@torch.inference_mode()
def _peak_mb(candidate: _Forward, device: torch.device) -> float | None:
    """Return the megabytes of a network's weights and of what its forward pass takes at once."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    candidate(candidate.images)
    torch.cuda.synchronize(device)
    weights = sum(w.numel() * w.element_size() for w in candidate.network.parameters())
    return (torch.cuda.max_memory_allocated(device) - before + weights) / 1e6
