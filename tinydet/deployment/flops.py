"""Count a detector's parameters and multiply-adds, with torch and, as a second opinion, thop.

torch's FlopCounterMode sees every convolution and matrix product, whichever module or function runs
it. thop, whose figures papers quote, has a rule for each class of module: it also counts norms and
pooling, but misses functional calls and subclasses of the modules it knows.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinydet.config import Experiment
from tinydet.deployment.fold_checkpoint import assumed_classes, both_forms
from tinydet.report.table import text_table

_NAMED = 4  # most classes of modules named in a line


@dataclass(frozen=True)
class Count:
    """The cost of one forward pass.

    Attributes:
        params: parameters of the network, without buffers.
        by_torch: multiply-adds of convolutions and matrix products by the class of the module that
            runs them, counted by torch.
        by_thop: operations by class of module, counted by thop; empty if it fails.
        thop_problem: why thop cannot count this network; empty if it can.
    """

    params: int
    by_torch: Mapping[str, int]
    by_thop: Mapping[str, float]
    thop_problem: str = ""

    @property
    def multiply_adds(self) -> int:
        """The total that torch counts."""
        return sum(self.by_torch.values())


def count(model: nn.Module, images: Tensor) -> Count:
    """Count the parameters of a network and the multiply-adds of a forward pass, in eval mode.

    Args:
        model: the network; it is not modified.
        images: its input, (B, 3, H, W) for a detector; the counts are of the whole batch.

    Raises:
        Exception: what the network's forward pass raises.
    """
    by_torch = _on_meta_copy(_count_with_torch, model, images)
    by_thop, problem = {}, ""
    try:
        by_thop = _on_meta_copy(_count_with_thop, model, images)
    except Exception as error:  # Its rules fail in many ways on inputs they do not expect.
        problem = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0]
    params = sum(parameter.numel() for parameter in model.parameters())
    return Count(params, by_torch, by_thop, problem)


def compare_counters(counted: Count) -> str:
    """Return a line that says whether thop agrees with torch, and which modules differ."""
    if counted.thop_problem:
        return f"thop cannot count this network ({counted.thop_problem}); only torch did"
    line = (
        f"thop counts {_giga(sum(counted.by_thop.values()))}, torch {_giga(counted.multiply_adds)}"
    )
    pairs = {
        name: (counted.by_thop.get(name, 0), counted.by_torch.get(name, 0))
        for name in sorted({*counted.by_torch, *counted.by_thop})
    }
    apart = {name: abs(a - b) for name, (a, b) in pairs.items() if abs(a - b) >= 0.5}
    if not apart:
        return f"{line}: they agree"
    largest = sorted(apart, key=lambda name: -apart[name])
    named = [f"{n} ({_giga(pairs[n][0])}, torch {_giga(pairs[n][1])})" for n in largest[:_NAMED]]
    more = f" and {len(apart) - _NAMED} more classes" if len(apart) > _NAMED else ""
    return f"{line}: they differ in {', '.join(named)}{more}"


def flops_lines(experiment: Experiment, size: tuple[int, int]) -> Iterator[str]:
    """Yield an experiment's parameters and multiply-adds in both forms, as lines of text.

    Args:
        experiment: neither its data set nor its weights need to exist.
        size: (H, W) of the input in pixels, multiples of 32.

    Raises:
        ValueError: the size is wrong, or the detector cannot be built or folded.
    """
    check_size("--shape", size)
    classes = assumed_classes(experiment)
    names = "its own" if experiment.data.classes else "assumed: the experiment names none"
    yield f"experiment  {experiment.name}"
    yield f"input       1x3x{size[0]}x{size[1]}, {len(classes)} classes ({names})"
    images = torch.zeros(1, 3, *size, dtype=torch.uint8)
    training, deploy = (count(form, images) for form in both_forms(experiment))
    header = ["", "M parameters", "G multiply-adds"]
    yield from text_table(
        header,
        [
            [form, f"{counted.params / 1e6:.2f}", f"{counted.multiply_adds / 1e9:.2f}"]
            for form, counted in (("training", training), ("deploy", deploy))
        ],
    )
    yield f"training: {compare_counters(training)}"
    yield f"deploy: {compare_counters(deploy)}"


def check_size(option: str, size: tuple[int, int]) -> None:
    """Check that an input size is a multiple of 32.

    Raises:
        ValueError: a side is not a positive multiple of 32.
    """
    if min(size) < 32 or any(side % 32 for side in size):
        raise ValueError(f"{option} {size[0]} {size[1]}: both must be multiples of 32")


def _on_meta_copy(counter: Any, model: nn.Module, images: Tensor) -> Any:
    """Count on a copy on the meta device; on the CPU if the network needs values."""
    for device in ("meta", "cpu"):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with _no_fused_kernels():
                    return counter(copy.deepcopy(model).to(device).eval(), images.to(device))
        except (RuntimeError, NotImplementedError):
            if device == "cpu":
                raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _no_fused_kernels() -> Iterator[None]:
    """Decompose attention and LSTMs into matrix products, which torch can count."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _count_with_torch(model: nn.Module, images: Tensor) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    flops: Counter[str] = Counter()
    running: list[tuple[int, int]] = []  # flops at a call's start, and of nested calls

    def begin(*_: Any) -> None:
        running.append((counter.get_total_flops(), 0))

    def end(module: nn.Module, *_: Any) -> None:
        at_begin, in_calls = running.pop()
        total = counter.get_total_flops() - at_begin
        flops[type(module).__name__] += total - in_calls
        if running:
            running[-1] = (running[-1][0], running[-1][1] + total)

    for module in model.modules():
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
    with counter:
        model(images)
    return {name: total // 2 for name, total in flops.items() if total}  # An add and a multiply.


def _count_with_thop(model: nn.Module, images: Tensor) -> dict[str, float]:
    from thop import profile  # It needs distutils, which newer versions of Python lack.

    total, _, layers = profile(model, (images,), verbose=False, ret_layer_info=True)
    counts: Counter[str] = Counter()
    below = _add_own(model, layers, counts)
    counts[type(model).__name__] += total - below
    return {name: ops for name, ops in counts.items() if ops}


def _add_own(module: nn.Module, layers: Mapping[str, Any], counts: Counter[str]) -> float:
    """Add each layer's operations without its children's, and return the layers' total."""
    total = 0.0
    for name, (ops, _, inner) in layers.items():
        child = module.get_submodule(name)
        counts[type(child).__name__] += ops - _add_own(child, inner, counts)
        total += ops
    return total


def _giga(operations: float) -> str:
    # At least three digits, for small networks.
    return f"{operations / 1e9:.2f} G" if operations >= 1e8 else f"{operations / 1e9:.3g} G"
