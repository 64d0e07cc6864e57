"""How much a detector computes: parameters and multiply-adds, counted twice.

Torch's counter sees every convolution and matrix product, whatever module or function asks for it.
thop, whose figures papers quote, has a rule for each class of module: it also counts norms and
pooling, and it sees neither functions nor classes derived from those it knows.
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
from tinydet.deployment.forms import assumed_classes, both_forms

_NAMED = 4  # kinds of modules named in a line


@dataclass(frozen=True)
class Count:
    """What one forward pass takes.

    Attributes:
        params: parameters of the network; buffers are none.
        by_torch: multiply-adds of convolutions and matrix products by the class of the module that
            runs them, as torch counts them.
        by_thop: operations by class of module, as thop counts them; empty if it cannot.
        thop_problem: why thop cannot count this network; empty if it can.
    """

    params: int
    by_torch: Mapping[str, int]
    by_thop: Mapping[str, float]
    thop_problem: str = ""

    @property
    def multiply_adds(self) -> int:
        """All that torch counts."""
        return sum(self.by_torch.values())


def count(model: nn.Module, images: Tensor) -> Count:
    """Count the parameters of a network and the multiply-adds of a forward pass, in eval mode.

    Args:
        model: the network; it is not modified.
        images: its input, (B, 3, H, W) for a detector; the counts are of the whole batch.

    Raises:
        Exception: whatever the network's forward pass raises.
    """
    by_torch = _shapes_alone(_count_with_torch, model, images)
    by_thop, problem = {}, ""
    try:
        by_thop = _shapes_alone(_count_with_thop, model, images)
    except Exception as error:  # Its rules index into what they are given: any error may come.
        problem = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0]
    params = sum(parameter.numel() for parameter in model.parameters())
    return Count(params, by_torch, by_thop, problem)


def compare_counters(counted: Count) -> str:
    """Return in one line how far thop agrees with torch, and by which modules it does not."""
    if counted.thop_problem:
        return f"thop cannot count this network ({counted.thop_problem}): torch counted it alone"
    torch_total, thop_total = counted.multiply_adds, sum(counted.by_thop.values())
    totals = [_giga(thop_total), _giga(torch_total)]
    unseen, added, other = [], [], []
    names = {*counted.by_torch, *counted.by_thop}
    pairs = {name: (counted.by_thop.get(name, 0), counted.by_torch.get(name, 0)) for name in names}
    for name in sorted(pairs, key=lambda name: (-abs(pairs[name][0] - pairs[name][1]), name)):
        by_thop, by_torch = pairs[name]
        if abs(by_thop - by_torch) < 0.5:
            continue
        if not by_thop:
            unseen.append(f"{name} ({_giga(by_torch)})")
        elif not by_torch:
            added.append(f"{name} ({_giga(by_thop)})")
        else:
            other.append(f"{name} ({_giga(by_thop)}, torch {_giga(by_torch)})")
    reasons = [
        f"{what} {_some(found)}"
        for what, found in (
            ("does not see what runs in", unseen),
            ("counts otherwise", other),
            ("adds the operations of", added),
        )
        if found
    ]
    told = f"thop counts {totals[0]}, torch {totals[1]}"
    return f"{told}: thop {'; it '.join(reasons)}" if reasons else f"{told}: they agree"


def flops_lines(experiment: Experiment, size: tuple[int, int]) -> Iterator[str]:
    """Yield an experiment's parameters and multiply-adds in both forms, as lines of text.

    Args:
        experiment: neither its data nor its weights need be there.
        size: (H, W) of the input in pixels, multiples of 32.

    Raises:
        ValueError: the size is wrong, or the detector cannot be built or folded.
    """
    check_size("--shape", size)
    classes = assumed_classes(experiment)
    names = "its own" if experiment.data.classes else "assumed: the experiment names none"
    yield f"input       1x3x{size[0]}x{size[1]}, {len(classes)} classes ({names})"
    images = torch.zeros(1, 3, *size, dtype=torch.uint8)
    training, deploy = (count(form, images) for form in both_forms(experiment))
    width = max(len("experiment"), len(experiment.name))
    yield f"{'':{width}}      parameters M    multiply-adds G"
    yield f"{'experiment':{width}}  training  deploy   training  deploy"
    yield (
        f"{experiment.name:{width}}  {training.params / 1e6:8.2f} {deploy.params / 1e6:7.2f}   "
        f"{training.multiply_adds / 1e9:8.2f} {deploy.multiply_adds / 1e9:7.2f}"
    )
    yield f"training    {compare_counters(training)}"
    yield f"deploy      {compare_counters(deploy)}"


def check_size(option: str, size: tuple[int, int]) -> None:
    """Refuse an input that is no whole number of strides.

    Raises:
        ValueError: a side is not a positive multiple of 32.
    """
    if min(size) < 32 or any(side % 32 for side in size):
        raise ValueError(f"{option} {size[0]} {size[1]}: both must be multiples of 32")


def _shapes_alone(counter: Any, model: nn.Module, images: Tensor) -> Any:
    """Count on a copy that has shapes and no values; on the CPU if the network needs values."""
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
    """Run attention and LSTMs as the matrix products they are made of, which torch can count."""
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
    running: list[tuple[int, int]] = []  # flops at each call's begin, and those of calls in it

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
    return {name: total // 2 for name, total in flops.items() if total}  # Add and multiply are two.


def _count_with_thop(model: nn.Module, images: Tensor) -> dict[str, float]:
    from thop import profile  # It needs distutils, which not every Python has.

    total, _, layers = profile(model, (images,), verbose=False, ret_layer_info=True)
    counts: Counter[str] = Counter()
    below = _add_own(model, layers, counts)
    counts[type(model).__name__] += total - below
    return {name: ops for name, ops in counts.items() if ops}


def _add_own(module: nn.Module, layers: Mapping[str, Any], counts: Counter[str]) -> float:
    """Add what each layer counts beside its children, and return what the layers count."""
    total = 0.0
    for name, (ops, _, inner) in layers.items():
        child = module.get_submodule(name)
        counts[type(child).__name__] += ops - _add_own(child, inner, counts)
        total += ops
    return total


def _giga(operations: float) -> str:
    # Small networks are counted as well: three digits at least.
    return f"{operations / 1e9:.2f} G" if operations >= 1e8 else f"{operations / 1e9:.3g} G"


def _some(found: list[str]) -> str:
    more = len(found) - _NAMED
    return ", ".join(found[:_NAMED]) + (f" and {more} more kinds of module" if more > 0 else "")
