"""Time folded networks in ONNX Runtime: python tests/benchmarks/fold_speed.py [MODEL ...].

Three forms of each network are exported by the same call, fully optimized by ONNX Runtime, and
timed in turns on the same input: as trained, re-parameterized by timm, and folded by
`tinydet.reparam`. The remaining difference is what no graph optimizer finds. With --torch the forms
are timed in torch, without export.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from random_weights import settle_norms
from timm.utils.model import reparameterize_model
from timm_models import build_model, example_images
from torch import Tensor, nn

from tinydet.cli import run
from tinydet.reparam import fold
from tinydet.reparam.verify import difference
from tinydet.report.table import text_table

MODELS = ("repvgg_a0", "mobileone_s1", "rexnet_100", "fastvit_t8", "resnet18", "repvit_m1")
_WARM_UP = 3
_SETTLED_SIZE = 128  # side in pixels of the images that the norms' statistics are drawn for
# Operators as exported, and as fused by ONNX Runtime.
_KINDS = {
    "Conv": "Conv",
    "FusedConv": "Conv",
    "BatchNormalization": "BatchNormalization",
    "Add": "Add",
}


@dataclass(frozen=True)
class Form:
    """One form of a network.

    Attributes:
        exported: operators of the ONNX file, by kind: Conv, BatchNormalization, Add; none in torch.
        optimized: those that ONNX Runtime leaves at its level EXTENDED (higher levels only rename
            what could not be fused).
        difference: largest difference from the unfolded form in any feature map, as a fraction of
            its largest value, both in the same runtime.
        milliseconds: of each run.
    """

    exported: Mapping[str, int]
    optimized: Mapping[str, int]
    difference: float
    milliseconds: Sequence[float]


def time_forms(name: str, size: int = 320, threads: int = 2, repeats: int = 100) -> dict[str, Form]:
    """Time the three forms of one of timm's models, on the same random image.

    Args:
        name: timm's name of the model; its weights are random.
        size: side of the input in pixels.
        threads: CPU threads of ONNX Runtime.
        repeats: timed runs of each form.

    Returns:
        The forms "unfolded", "timm" and "folded".

    Raises:
        ValueError: an argument is out of range, timm has no such model, or ONNX Runtime is missing.
    """
    networks, images = _networks(name, size, threads, repeats)
    files = {form: _export(network, images) for form, network in networks.items()}
    sessions = {form: _session(file, threads) for form, file in files.items()}
    calls = {form: partial(_run, session, images) for form, session in sessions.items()}
    outputs = {form: call() for form, call in calls.items()}
    milliseconds = _time_in_turns(calls, repeats)
    return {
        form: Form(
            exported=_operators(file),
            optimized=_operators(_optimized(file)),
            difference=difference(outputs["unfolded"], outputs[form]).max_rel,
            milliseconds=milliseconds[form],
        )
        for form, file in files.items()
    }


def time_in_torch(
    name: str, size: int = 320, threads: int = 2, repeats: int = 100
) -> dict[str, Form]:
    """Time the three forms of a model as torch runs them; arguments as in `time_forms`."""
    networks, images = _networks(name, size, threads, repeats)
    calls = {form: partial(network, images) for form, network in networks.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            outputs = {form: call() for form, call in calls.items()}
            milliseconds = _time_in_turns(calls, repeats)
    finally:
        torch.set_num_threads(before)
    return {
        form: Form({}, {}, difference(outputs["unfolded"], outputs[form]).max_rel, times)
        for form, times in milliseconds.items()
    }


def _networks(
    name: str, size: int, threads: int, repeats: int
) -> tuple[dict[str, nn.Module], Tensor]:
    """Return the three forms of a model and the image they are timed on."""
    if min(size, threads, repeats) < 1:
        raise ValueError("--size, --threads and --repeats must be at least 1")
    model = build_model(name)
    settle_norms(model, example_images(name, 2, _SETTLED_SIZE, _SETTLED_SIZE), seed=0)
    images = example_images(name, 1, size, size)
    return {
        "unfolded": model,
        "timm": reparameterize_model(model),
        "folded": fold(model, images)[0],
    }, images


def _export(network: nn.Module, images: Tensor) -> ModelProto:
    # Without `optimize` the exporter leaves biases as computations, which keeps ONNX Runtime from
    # folding a norm into a convolution. The exporter reports its steps on stdout.
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
    # A spinning thread takes time from the other sessions' threads.
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


def _optimized(file: ModelProto) -> ModelProto:
    """Return the graph as ONNX Runtime rewrites it."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        _session(file, 1, options)
        return onnx.load(path)


def _operators(file: ModelProto) -> dict[str, int]:
    counts = Counter(_KINDS.get(node.op_type) for node in file.graph.node)
    return {kind: counts[kind] for kind in dict.fromkeys(_KINDS.values())}


def _run(session: Any, images: Tensor) -> list[Tensor]:
    feed = {session.get_inputs()[0].name: images.numpy()}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def _time_in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    milliseconds: dict[str, list[float]] = {form: [] for form in calls}
    names = list(calls)
    for turn in range(-_WARM_UP, repeats):
        # Each form goes first equally often: the previous run affects the caches.
        for form in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            calls[form]()
            if turn >= 0:
                milliseconds[form].append((time.perf_counter() - begin) * 1000)
    return milliseconds


def _cells(name: str, form_name: str, form: Form, unfolded: Form) -> list[str]:
    times = form.milliseconds
    median = statistics.median(times)
    p95 = sorted(times)[-(-95 * len(times) // 100) - 1]  # nearest rank
    return [
        name,
        form_name,
        f"{median:.2f}",
        f"{p95:.2f}",
        f"{median / statistics.median(unfolded.milliseconds):.2f}",
        *(f"{form.exported[kind]} / {form.optimized[kind]}" for kind in form.exported),
        f"{form.difference:.1e}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"names of timm's models; default: {' '.join(MODELS)}",
    )
    parser.add_argument("--size", type=int, default=320, help="side of the input, default 320")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, default 2")
    parser.add_argument("--repeats", type=int, default=100, help="runs of each, default 100")
    parser.add_argument("--torch", action="store_true", help="time in torch, without export")
    return parser


def main(args: argparse.Namespace) -> None:
    """Build, fold, export, time, print."""
    time_all = time_in_torch if args.torch else time_forms
    rows = []
    for name in args.models or MODELS:
        forms = time_all(name, args.size, args.threads, args.repeats)
        rows += [_cells(name, key, form, forms["unfolded"]) for key, form in forms.items()]
    print(
        f"{'torch' if args.torch else 'ONNX Runtime'} on the CPU, {args.threads} threads, "
        f"1x3x{args.size}x{args.size}, {args.repeats} runs of each form in turns"
        + ("" if args.torch else "; operators as exported / as optimized")
    )
    operators = [] if args.torch else ["Conv", "Norm", "Add"]
    header = ["model", "form", "median ms", "p95 ms", "ratio", *operators, "difference"]
    print("\n".join(text_table(header, rows)))


if __name__ == "__main__":
    run(main, _parser())
