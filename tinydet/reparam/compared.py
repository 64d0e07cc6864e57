"""The inputs on which a folded network is compared with the original, and its own precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tinydet.reparam.affine import multiply_adds_of
from tinydet.reparam.dataflow import DataFlow, Op, observe
from tinydet.reparam.deep_copy import deep_copy
from tinydet.reparam.dispatch import DispatchMode
from tinydet.reparam.exact import exact_arithmetic, exact_copy
from tinydet.reparam.examples import Example
from tinydet.reparam.norms import is_norm
from tinydet.reparam.verify import difference, tensors_in, tensors_returned

# Kernels of one operation have names of their own on each device.
_KERNELS = ("batch_norm", "scaled_dot_product", "convolution", "layer_norm")


class Operations(DispatchMode):
    """Notes the operations that run, apart from casts.

    Attributes:
        macs: their multiply-adds.
        names: the name, the same for all kernels of one operation, and the number of tensors of
            each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.macs = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and note it."""
        if func.overloadpacket is not torch.ops.aten._to_copy:
            self.names.append(_name(str(func.overloadpacket), args))
        result = func(*args, **kwargs)
        first = next(iter(tensors_in(result)), None)
        if first is not None:
            self.macs += multiply_adds_of(str(func.overloadpacket), args, first.shape)
        return result


def _name(name: str, args: Sequence[Any]) -> str:
    """Return a name of an operation that is the same for all kernels of it."""
    name = next((kernel for kernel in _KERNELS if kernel in name), name)
    return f"{name} of {sum(isinstance(a, Tensor) for a in args)}"


def _work(flow: DataFlow) -> list[Op]:
    return [op for op in flow.ops if op.name != "aten._to_copy"]


def run_in_own_dtype(model: nn.Module, example: Example, mode: Operations) -> Any | None:
    """Run a network as it is on an example; None if it cannot, as half precision on some CPUs."""
    weight = next((t for _, t in floating_tensors(model)), torch.empty(0))

    def moved(x: Tensor) -> Tensor:
        return x.to(weight.device)

    def cast(x: Tensor) -> Tensor:
        return x.to(weight) if x.is_floating_point() else x.to(weight.device)

    for change in (moved, cast):
        try:
            return example.mapped(change).run(model, mode)
        except Exception:
            # Any network may reject an input, or a device a dtype, with any exception.
            mode.names.clear()
            mode.macs = 0
    return None


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Undo what running a network changes in its buffers, such as a counter of its calls."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            if name in before and _differs(buffer, before[name]):
                buffer.copy_(before[name])


def changed_buffers(copy: nn.Module, original: nn.Module) -> list[str]:
    """Return the names of the buffers that have changed in a copy since it was made."""
    before = dict(original.named_buffers())
    return [
        name
        for name, buffer in copy.named_buffers()
        if name in before and _differs(buffer, before[name].cpu().to(buffer.dtype))
    ]


def _differs(a: Tensor, b: Tensor) -> bool:
    return a.layout is torch.strided and not torch.equal(a, b)


def choose_examples(
    original: nn.Module, given: Sequence[Example], names: Sequence[str]
) -> tuple[list[Example], list[Any], DataFlow]:
    """Return the inputs to compare on, the original's output for each, and its flow for the first.

    The first is random and as small as the network allows without running other operations; then
    come odd, larger and smaller sizes and another batch size as far as the network takes them, and
    random values for the other examples.

    Args:
        original: the network in eval mode and float64, on the CPU.
        given: the caller's examples.
        names: the operations that run for the first of them; empty if they are not known.
            Then it is compared on as well, as it does not run in its own dtype.

    Raises:
        ValueError: the network does not run, or nothing can be compared, as its outputs hold no
            number.
    """
    base = given[0].random()
    for small in base.smaller():
        flow = _observed(original, small)
        if flow is not None and [_name(op.name, op.args) for op in _work(flow)] == list(names):
            base = small
            break
    else:
        try:
            flow = observe(original, base, is_leaf=is_norm)
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"{type(original).__name__} does not run in float64 on the CPU ({what})"
            ) from error
    if not base.positive and any(t.isnan().any() for t in tensors_returned(flow.returned)):
        # The network takes no negative numbers, as one that starts with a root.
        return choose_examples(original, [replace(x, positive=True) for x in given], names)
    examples, outputs = [base], [flow.returned]
    for sizes in base.of_other_sizes():
        tried = ((other, _output(original, other)) for other in sizes)
        for other, output in itertools.islice((x for x in tried if x[1] is not None), 1):
            examples.append(other)
            outputs.append(output)
    more = [given[0].in_float64()] if not names else []
    more += [form for example in given[1:] for form in (example.random(), example.in_float64())]
    examples += more
    outputs += [example.run(original) for example in more]
    if not any(t.numel() for output in outputs for t in tensors_returned(output)):
        raise ValueError(
            f"{type(original).__name__} returns no numbers for the example input, so there is "
            "nothing to compare; give an example for which it does"
        )
    return examples, outputs, flow


def _observed(model: nn.Module, example: Example) -> DataFlow | None:
    """Return a network's data flow, or None if it does not take the input."""
    try:
        return observe(model, example, is_leaf=is_norm)
    except Exception:
        # Any network may reject other sizes, with any exception.
        return None


def _output(model: nn.Module, example: Example) -> Any | None:
    """Return a network's output, or None if it does not take the input."""
    try:
        return example.run(model)
    except Exception:
        # Any network may reject other sizes, with any exception.
        return None


def why_imprecise(
    model: nn.Module, folded: nn.Module, example: Example, expected: Any, mode: Operations
) -> str:
    """Return what is wrong with a folded network in its own dtype; empty if nothing is.

    Args:
        model: the original.
        folded: the folded network, cast to the original's dtypes.
        example: the caller's example.
        expected: the original's output for it in its own dtype; None if it does not run.
        mode: notes the operations of the folded network.
    """
    masks = {name for name, tensor in floating_tensors(model) if not _has_finite_sum(tensor)}
    for name, tensor in floating_tensors(folded):
        if name not in masks and not _has_finite_sum(tensor):
            return f"{name} does not fit {tensor.dtype}"
    if expected is None:
        return ""
    found = run_in_own_dtype(folded, example, mode)
    if found is None:
        return "it does not run in its own dtype"
    if _is_finite(expected) and not _is_finite(found):
        return "its output is not finite in its own dtype"
    kinds, found_kinds = ([t.dtype for t in tensors_returned(form)] for form in (expected, found))
    if kinds != found_kinds:
        other = next((a, b) for a, b in zip(kinds, found_kinds, strict=False) if a != b)
        return f"an output is in {other[1]}, not in {other[0]}"
    floats = [kind for kind in kinds if kind.is_floating_point]
    weights = {t.dtype for _, t in floating_tensors(model)}  # They may be coarser than the output.
    allowed = max((math.sqrt(torch.finfo(kind).eps) for kind in {*floats, *weights}), default=0.0)
    if _apart(expected, found) <= allowed:
        return ""
    if _apart(expected, run_in_own_dtype(deep_copy(model), example, Operations())) > allowed:
        return "a copy of the original network computes another function than the network itself"
    # The network may amplify rounding, or decide by it as NMS does: compare without it.
    with exact_arithmetic():
        exact = [example.in_float64().run(exact_copy(form)) for form in (model, folded)]
    apart = _apart(*exact)
    if apart <= allowed:
        return ""
    return f"its output in {floats[0] if floats else 'its own dtype'} changes by {apart:.1e}"


def _has_finite_sum(tensor: Tensor) -> bool:
    # Finite only if all numbers are, in a tenth of the time that `isfinite` takes.
    return bool(tensor.detach().cpu().sum(dtype=torch.float64).isfinite())


def _apart(expected: Any, found: Any) -> float:
    try:
        return difference(expected, found).max_rel
    except ValueError:
        return math.inf


def _is_finite(output: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_returned(output))


def floating_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the names and tensors of all floating-point parameters and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
