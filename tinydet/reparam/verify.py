"""Compare two networks by their outputs."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OutputDifference:
    """The difference between two sets of outputs.

    Attributes:
        max_abs: largest absolute difference of any two elements.
        max_rel: largest over output tensors of the absolute difference divided by the largest
            absolute value of the reference's tensor (0 if both are all zero). It is not
            element-wise: an output near zero carries the rounding error of larger ones.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0

    def merge(self, other: OutputDifference) -> OutputDifference:
        """Return the larger of both, field by field."""
        return OutputDifference(max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    # This is called for each operation: the most frequent kinds first.
    if value is None or isinstance(value, (int, float, str, bytes)):
        return []
    if isinstance(value, (tuple, list, Sequence)):
        return [t for item in value for t in tensors_in(item)]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in tensors_in(getattr(value, f.name))]
    return []


def tensors_returned(value: Any, within: tuple[int, ...] = ()) -> list[Tensor]:
    """Return the tensors in a network's output: as `tensors_in`, also in NumPy arrays and objects.

    Args:
        value: the output.
        within: the ids of the objects around it, which may refer to each other.

    Raises:
        ValueError: there is an iterator, which cannot be read without using it up.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, np.ndarray):
        return (
            [torch.from_numpy(np.ascontiguousarray(value))] if value.dtype.kind in "biufc" else []
        )
    if isinstance(value, Iterator):
        raise ValueError(f"it returns a {type(value).__name__}, whose items cannot be compared")
    if value is None or isinstance(value, (int, float, str, bytes, nn.Module, type)):
        return []
    if id(value) in within:
        return []
    parts: Iterable[Any] = getattr(value, "__dict__", {}).values()
    if isinstance(value, (Sequence, Mapping)):
        parts = value.values() if isinstance(value, Mapping) else value
    elif dataclasses.is_dataclass(value):  # May have slots.
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
    return [t for part in parts for t in tensors_returned(part, (*within, id(value)))]


def difference(a: Any, b: Any) -> OutputDifference:
    """Compare two outputs tensor by tensor.

    Args:
        a: the reference: a tensor, or nested tuples, lists, dicts or objects with tensors.
        b: the output to compare with it.

    Returns:
        The difference; infinite where either side has a value that is not finite, unless both are
        minus infinity.

    Raises:
        ValueError: the two differ in number of tensors or in a shape.
    """
    tensors_a, tensors_b = tensors_returned(a), tensors_returned(b)
    shapes_a = [tuple(t.shape) for t in tensors_a]
    shapes_b = [tuple(t.shape) for t in tensors_b]
    if shapes_a != shapes_b:
        raise ValueError(f"outputs differ in shape: {shapes_a} and {shapes_b}")
    largest = OutputDifference()
    for x, y in zip(tensors_a, tensors_b, strict=True):
        if x.numel() == 0:
            continue
        x, y = (_in_float64(t.detach().cpu()) for t in (x, y))  # Some devices have no float64.
        masked = (x == -math.inf) & (x == y)  # As where attention is masked.
        x, y = x.masked_fill(masked, 0.0), y.masked_fill(masked, 0.0)
        max_abs = (x - y).abs().max().item()
        if not math.isfinite(max_abs):
            return OutputDifference(math.inf, math.inf)
        scale = x.abs().max().item()
        max_rel = 0.0 if max_abs == 0.0 else max_abs / scale if scale > 0.0 else math.inf
        largest = largest.merge(OutputDifference(max_abs, max_rel))
    return largest


def _in_float64(x: Tensor) -> Tensor:
    return torch.view_as_real(x.to(torch.complex128)) if x.is_complex() else x.double()


def compare_outputs(a: nn.Module, b: nn.Module, inputs: Sequence[Any]) -> OutputDifference:
    """Run two networks on the same inputs and compare what they return.

    Args:
        a: the reference.
        b: the network to compare with it.
        inputs: each is a tensor or a tuple of positional arguments. Each network gets a copy.

    Returns:
        The largest differences over all inputs.

    Raises:
        ValueError: there is no input, or the outputs differ in number or shape, or hold no tensor.
    """
    if not inputs:
        raise ValueError("inputs: the list is empty: nothing to compare")
    largest = OutputDifference()
    with torch.no_grad():
        for item in inputs:
            arguments = item if isinstance(item, tuple) else (item,)
            output_a, output_b = (model(*copied(arguments)) for model in (a, b))
            if not tensors_returned(output_a):
                raise ValueError(f"{type(a).__name__} returns no tensor: nothing to compare")
            largest = largest.merge(difference(output_a, output_b))
    return largest


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with each tensor in nested tuples, lists, dicts and dataclasses changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # A defaultdict takes other arguments than a dict.
        changed.update((key, map_tensors(item, change)) for key, item in value.items())
        return changed
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and tensors_in(value):
        new = copy.copy(value)
        for f in dataclasses.fields(value):
            object.__setattr__(new, f.name, map_tensors(getattr(value, f.name), change))
        return new
    return value


def copied(value: Any) -> Any:
    """Return a value with its tensors cloned, for networks that modify their input in place."""
    return map_tensors(value, Tensor.clone)


# Folding reorders float64 sums of some thousand terms: 1e-9 is far above that rounding error, and
# far below the effect of a wrong fold.
TOLERANCE = 1e-9
# A network that amplifies rounding errors beyond that may differ by a multiple of what a change of
# its input's last digit makes: a fold causes many such changes. But never by more than 1e-3.
_NOISE = 100.0
_LARGEST_NOISE = 1e-3


def why_different(expected: Any, found: Any, nudged: Callable[[], Any]) -> str:
    """Return how two outputs differ beyond float64 rounding errors; empty if they do not.

    Args:
        expected: the output of the reference network.
        found: the output to compare with it.
        nudged: returns the reference network's output for inputs that differ in the last digit;
            called only where the difference is not tiny.
    """
    apart = difference(expected, found).max_rel
    if apart <= TOLERANCE:
        return ""
    if not math.isfinite(apart):
        return "its output is not finite, or is no longer zero where it was"
    if apart <= _LARGEST_NOISE and apart <= _NOISE * difference(expected, nudged()).max_rel:
        return ""
    return f"its output changes by {apart:.1e} of its largest value (allowed {TOLERANCE:.0e})"


def nudged(x: Tensor) -> Tensor:
    """Return floats that differ in their last digit; other tensors unchanged."""
    return x * (1 + torch.finfo(x.dtype).eps) if x.is_floating_point() else x
