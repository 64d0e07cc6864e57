"""A checkpoint in int8: accuracy and speed beside those in float, and what had to stay float."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor

from tinydet.atomic import replacing
from tinydet.config import Experiment
from tinydet.data.dataset import load_split
from tinydet.data.index import Index
from tinydet.deployment.images import sample_images
from tinydet.deployment.onnx import export_detector
from tinydet.deployment.quantize import Quantizer, improve, sensitivity
from tinydet.deployment.reparameterize import load_folded
from tinydet.deployment.runtime import OnnxNetwork, pad_to_size
from tinydet.experiment_file import experiment_from_dict, override
from tinydet.training.checkpoint import read_checkpoint
from tinydet.training.evaluate import evaluate_detector, require_objects

_FEW = 8  # images that the layers' sensitivity is measured on
_ROUNDS = 5  # rounds of turns in timing


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantise.

    Attributes:
        out: the file; None is the checkpoint's name with `.int8.onnx`.
        images: training images that ranges are measured on.
        budget: AP50, in 0..1, that may be lost.
        size: (H, W) of the input; None lets both vary.
        overrides: "a.b=value" for the checkpoint's experiment.
    """

    out: Path | None = None
    images: int = 64
    budget: float = 0.01
    size: tuple[int, int] | None = None
    overrides: tuple[str, ...] = ()


def quantize_checkpoint(source: Path, options: QuantizeOptions) -> Iterator[str]:
    """Quantise a checkpoint of either form, yielding what to tell the user line by line.

    Layers are kept in float, the most sensitive first and each time twice as many, until the loss
    is within the budget. That is judged on the experiment's test split, where the table's figures
    are from as well.

    Raises:
        ValueError: an option is wrong, the data is missing, the test split has no object to find,
            or the budget cannot be held; nothing is written then.
    """
    if options.images < 1 or options.budget < 0:
        raise ValueError("--images must be at least 1 and --budget at least 0")
    stored = experiment_from_dict(read_checkpoint(source)["experiment"])
    experiment = override(stored, list(options.overrides))
    detector = load_folded(source)
    data = replace(experiment.data, classes=detector.classes)
    experiment = replace(experiment, data=data)
    index = load_split(data, data.test_split)
    require_objects(index)
    calibration = sample_images(experiment, options.images, 1, data.train_split)
    if not calibration.real:
        raise ValueError(f"no training images to measure ranges on: {calibration.source}")
    yield f"calibration {calibration.source}"
    images = [pad_to_size(batch, options.size) for batch in calibration.batches]

    plain = export_detector(detector, data, options.size)
    forms = {"float32": plain, "int8, naive": Quantizer(plain, images).quantize()}
    improved, places = improve(plain, images)
    quantizer = Quantizer(improved, images)
    best, name = quantizer.quantize(), "int8"
    forms[name] = best
    yield f"balanced    channels at {places} places between convolutions; biases corrected"
    accuracy = {form: _ap50(model, index, experiment) for form, model in forms.items()}
    kept: list[str] = []
    if accuracy["float32"] - accuracy[name] > options.budget:
        yield f"sensitivity {accuracy['float32'] - accuracy[name]:.4f} AP50 lost: layer by layer"
        few = images[:_FEW]
        order = sorted(sensitivity(quantizer, few), key=lambda found: -found[1])
        yield from (f"            {node}: {change:.2e}" for node, change in order[:_FEW])
        count = 1
        while accuracy["float32"] - accuracy[name] > options.budget and len(kept) < len(order):
            kept = [node for node, _ in order[:count]]
            best, name = quantizer.quantize(keep=kept), f"int8 but {len(kept)} layers"
            forms[name], accuracy[name] = best, _ap50(best, index, experiment)
            yield f"            {len(kept)} in float: AP50 {accuracy[name]:.4f}"
            count *= 2
    yield from _table(forms, accuracy, images)
    lost = accuracy["float32"] - accuracy[name]
    if lost > options.budget:
        raise ValueError(
            f"{source}: int8 loses {lost:.4f} AP50, more than --budget {options.budget:g}: "
            "nothing written"
        )
    path = options.out or source.with_suffix(".int8.onnx")
    with replacing(path) as temporary:
        temporary.write_bytes(best.SerializeToString())
    yield f"wrote       {path} ({path.stat().st_size / 1e6:.1f} MB), {len(kept)} layers in float"


def _ap50(model: ModelProto, index: Index, experiment: Experiment) -> float:
    cpu = torch.device("cpu")
    metrics = evaluate_detector(OnnxNetwork(model), index, experiment.data, 1, cpu)
    return metrics.ap50


def _table(
    forms: Mapping[str, ModelProto], accuracy: Mapping[str, float], images: Sequence[Tensor]
) -> Iterator[str]:
    times = _time({name: OnnxNetwork(model) for name, model in forms.items()}, images)
    width = max(map(len, forms))
    yield f"{'':{width}}   AP50    lost    MB   median ms   img/s"
    first = accuracy["float32"]
    for name, model in forms.items():
        size, ms = model.ByteSize() / 1e6, times[name]
        yield (
            f"{name:{width}} {accuracy[name]:.4f} {first - accuracy[name]:7.4f} {size:5.1f} "
            f"{ms:11.2f} {1000 / ms:7.1f}"
        )


def _time(networks: Mapping[str, OnnxNetwork], images: Sequence[Tensor]) -> dict[str, float]:
    """Return the median milliseconds of an image; the networks take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(_ROUNDS + 1):
        for name, network in networks.items():
            for batch in images[:10]:
                start = time.perf_counter()
                network.detect(batch)
                if turn:  # The first is to warm up.
                    seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}
