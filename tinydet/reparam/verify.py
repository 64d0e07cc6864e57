"""Compare two networks by their outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [t for item in value for t in tensors_in(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in tensors_in(getattr(value, f.name))]
    return []


def difference(a: Any, b: Any) -> OutputDifference:
    """Compare two outputs tensor by tensor.

    Args:
        a: the reference: a tensor, or nested tuples, lists, dicts or dataclasses of tensors.
        b: the output to compare with it.

    Returns:
        The difference; infinite where either side has a value that is not finite.

    Raises:
        ValueError: the two differ in number of tensors or in a shape.
    """
    tensors_a, tensors_b = tensors_in(a), tensors_in(b)
    shapes_a = [tuple(t.shape) for t in tensors_a]
    shapes_b = [tuple(t.shape) for t in tensors_b]
    if shapes_a != shapes_b:
        raise ValueError(f"outputs differ in shape: {shapes_a} and {shapes_b}")
    largest = OutputDifference()
    for x, y in zip(tensors_a, tensors_b, strict=True):
        if x.numel() == 0:
            continue
        x, y = x.detach().double(), y.detach().double().to(x.device)
        max_abs = (x - y).abs().max().item()
        if not math.isfinite(max_abs):
            return OutputDifference(math.inf, math.inf)
        scale = x.abs().max().item()
        max_rel = 0.0 if max_abs == 0.0 else max_abs / scale if scale > 0.0 else math.inf
        largest = largest.merge(OutputDifference(max_abs, max_rel))
    return largest


def compare_outputs(a: nn.Module, b: nn.Module, inputs: Sequence[Any]) -> OutputDifference:
    """Run two networks on the same inputs and compare what they return.

    Args:
        a: the reference.
        b: the network to compare with it.
        inputs: each is a tensor or a tuple of positional arguments. Each network gets a copy.

    Returns:
        The largest differences over all inputs.

    Raises:
        ValueError: the outputs differ in number or shape, or hold no tensor at all.
    """
    largest = OutputDifference()
    with torch.no_grad():
        for item in inputs:
            arguments = item if isinstance(item, tuple) else (item,)
            output_a, output_b = (model(*copied(arguments)) for model in (a, b))
            if not tensors_in(output_a):
                raise ValueError(f"{type(a).__name__} returns no tensor: nothing to compare")
            largest = largest.merge(difference(output_a, output_b))
    return largest


def copied(value: Any) -> Any:
    """Return a value with its tensors cloned, for networks that modify their input in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, copied(item)) for key, item in value.items())
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    return value


# Folding reorders float64 sums of some thousand terms: 1e-9 is far above that rounding error, and
# far below the effect of a wrong fold.
_TOLERANCE = 1e-9
# A network that amplifies rounding errors beyond that may differ by a multiple of what a change of
# its input's last digit makes: a fold causes many such changes.
_NOISE = 100.0


def why_different(model: nn.Module, inputs: tuple[Any, ...], expected: Any, found: Any) -> str:
    """Return how two outputs differ beyond float64 rounding errors; empty if they do not.

    Args:
        model: the reference network.
        inputs: its positional arguments.
        expected: its output.
        found: the output to compare with it.
    """
    apart = difference(expected, found).max_rel
    if apart <= _TOLERANCE:
        return ""
    if not math.isfinite(apart):
        return "its output is not finite, or is no longer zero where it was"
    with torch.no_grad():
        nudged = tuple(_nudged(x) for x in copied(inputs))
        noise = difference(expected, model(*nudged)).max_rel
    if apart <= _NOISE * noise:
        return ""
    return f"its output changes by {apart:.1e} of its largest value (allowed {_TOLERANCE:.0e})"


def _nudged(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x * (1 + torch.finfo(x.dtype).eps)
