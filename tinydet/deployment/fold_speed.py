"""How much faster a folded backbone is in ONNX Runtime, beside what others make of it.

Three forms of each network are exported by the same call, optimised by ONNX Runtime as far as it
can, and take turns on the same input: as it was trained, re-parameterized by timm, folded by us.
What is left of the difference is what no graph optimiser finds.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from tinydet.deployment.speed import Timing
from tinydet.reparam import fold
from tinydet.reparam.verify import difference
from tinydet.reparam.zoo_models import build_model, example_images, settle_norms

MODELS = ("repvgg_a0", "mobileone_s1", "rexnet_100", "fastvit_t8", "resnet18", "repvit_m1")
_WARM_UP = 3
_SETTLED_SIZE = 128  # pixels a side: any will do for statistics
# Operators as exported, and as ONNX Runtime fuses them.
_KINDS = {
    "Conv": "Conv",
    "FusedConv": "Conv",
    "BatchNormalization": "BatchNormalization",
    "Add": "Add",
}


@dataclass(frozen=True)
class FoldSpeedOptions:
    """What to time.

    Attributes:
        size: side of the input in pixels.
        threads: of ONNX Runtime.
        repeats: timed runs of each form.
    """

    size: int = 320
    threads: int = 2
    repeats: int = 100


@dataclass(frozen=True)
class Form:
    """One form of a network.

    Attributes:
        exported: operators of the ONNX file, by kind: Conv, BatchNormalization, Add.
        optimised: those that ONNX Runtime leaves at its level EXTENDED (above it, what could not be
            fused away is only disguised).
        difference: largest difference from the unfolded form in any feature map, as a fraction of
            its largest value, both in ONNX Runtime.
        timing: milliseconds of each run.
    """

    exported: Mapping[str, int]
    optimised: Mapping[str, int]
    difference: float
    timing: Timing = field(default_factory=Timing)


def time_models(names: Sequence[str], options: FoldSpeedOptions) -> Iterator[str]:
    """Time models of timm, yielding the lines of one table.

    Args:
        names: timm's names; their weights are random.
        options: what to time.

    Raises:
        ValueError: an option is out of range, ONNX Runtime is missing, or a fold is wrong.
    """
    if min(options.size, options.threads, options.repeats) < 1:
        raise ValueError("--size, --threads and --repeats must be at least 1")
    yield (
        f"ONNX Runtime on the CPU, {options.threads} threads, 1x3x{options.size}x{options.size}, "
        f"{options.repeats} runs of each form in turns; operators as exported, and as optimised"
    )
    yield (
        f"{'':20} {'':10} median ms   p95 ms   ratio     Conv       Norm        Add     difference"
    )
    for name in names:
        forms = time_forms(name, options)
        unfolded = forms["unfolded"].timing.median
        for form_name, form in forms.items():
            yield _line(name, form_name, form, unfolded)


def time_forms(name: str, options: FoldSpeedOptions) -> dict[str, Form]:
    """Time the three forms of one of timm's models, on the same random image.

    Args:
        name: timm's name of it.
        options: what to time.

    Returns:
        The forms "unfolded", "timm" and "folded".
    """
    model = build_model(name)
    settle_norms(model, example_images(name, 2, _SETTLED_SIZE, _SETTLED_SIZE), seed=0)
    images = example_images(name, 1, options.size, options.size)
    networks = {
        "unfolded": model,
        "timm": reparameterize_model(model),
        "folded": fold(model, images)[0],
    }
    files = {form: _export(network, images) for form, network in networks.items()}
    sessions = {form: _session(file, options.threads) for form, file in files.items()}
    outputs = {form: _run(session, images) for form, session in sessions.items()}
    timings = _time_in_turns(sessions, images, options.repeats)
    return {
        form: Form(
            exported=_operators(file),
            optimised=_operators(_optimised(file)),
            difference=difference(outputs["unfolded"], outputs[form]).max_rel,
            timing=timings[form],
        )
        for form, file in files.items()
    }


def _export(network: nn.Module, images: Tensor) -> ModelProto:
    # Without `optimize` the exporter leaves biases that are computed, and those keep ONNX Runtime
    # from folding a norm into a convolution. It reports its steps on stdout.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (images,), dynamo=True, optimize=True)
    assert program is not None
    return program.model_proto


def _session(file: ModelProto, threads: int, options: Any = None) -> Any:
    runtime = _onnxruntime()
    options = options or runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A thread that spins takes time from whatever else runs, the other forms' threads included.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(
        file.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("onnxruntime is missing: pip install 'tinydet[deploy]'") from None
    return onnxruntime


def _optimised(file: ModelProto) -> ModelProto:
    """Return the graph as ONNX Runtime rewrites it."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        _session(file, 1, options)
        return onnx.load(path)


def _operators(file: ModelProto) -> dict[str, int]:
    counts = Counter(_KINDS.get(node.op_type) for node in file.graph.node)
    return {kind: counts[kind] for kind in dict.fromkeys(_KINDS.values())}


def _run(session: Any, images: Tensor) -> list[Tensor]:
    feed = {session.get_inputs()[0].name: images.numpy()}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def _time_in_turns(sessions: Mapping[str, Any], images: Tensor, repeats: int) -> dict[str, Timing]:
    timings = {form: Timing() for form in sessions}
    names = list(sessions)
    for turn in range(-_WARM_UP, repeats):
        # Each goes first as often as the others: what ran before leaves its traces in the caches.
        for form in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            _run(sessions[form], images)
            if turn >= 0:
                timings[form].images += 1
                timings[form].latencies.append((time.perf_counter() - begin) * 1000)
    return timings


def _line(name: str, form_name: str, form: Form, unfolded: float) -> str:
    timing = form.timing
    counts = "  ".join(f"{form.exported[k]:4} {form.optimised[k]:4}" for k in form.exported)
    return (
        f"{name:20} {form_name:10} {timing.median:9.2f} {timing.p95:8.2f} "
        f"{timing.median / unfolded:7.2f}  {counts}  {form.difference:10.1e}"
    )
