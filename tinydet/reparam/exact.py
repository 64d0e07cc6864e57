"""Run networks in float64, whatever dtypes their code asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydet.reparam.deep_copy import deep_copy
from tinydet.reparam.dispatch import DispatchMode
from tinydet.reparam.verify import map_tensors, tensors_in


def exact_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network in float64 on the CPU, with the tensors of plain attributes."""
    # Converted on the way: a copy in the original's dtype would take time and memory.
    known: dict[Tensor, Tensor] = {
        p: nn.Parameter(_in_float64(p.detach()), p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter and p.is_floating_point() and not vars(p)
    }
    exact = deep_copy(model, known).cpu().double()
    for module in exact.modules():
        vars(module).update(map_tensors(plain_tensors(module), _in_float64))
    return exact


def plain_tensors(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that hold tensors and are no parameters or buffers."""
    return {n: v for n, v in vars(module).items() if n[0] != "_" and tensors_in(v)}


def _in_float64(x: Tensor) -> Tensor:
    return x.cpu().to(_exact(x.dtype), copy=True)


class _Float64(DispatchMode):
    """Makes every cast, factory and reduction with a floating or complex dtype use float64.

    Networks name such dtypes for mixed precision, or because a factory needs one. Here they would
    reduce the precision of checks, or meet float64 tensors in operations that refuse a mixture.
    """

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation in float64."""
        if func is torch.ops.aten.convolution.default and _is_depthwise(args):
            return _depthwise(*args[:6])
        if dtype := kwargs.get("dtype"):
            kwargs = {**kwargs, "dtype": _exact(dtype)}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default:
            # A tensor made of numbers, as by `torch.tensor`, arrives here with its dtype.
            return result.to(_exact(result.dtype))
        return result


def _exact(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _is_depthwise(args: tuple[Any, ...]) -> bool:
    """Whether this is a depthwise 2-D convolution with fewer taps than channels."""
    x, weight, _, stride, padding, _, transposed, _, groups = args
    several = x.ndim == weight.ndim == 4 and len(stride) == len(padding) == 2
    return several and not transposed and groups == x.shape[1] > weight[0].numel()


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """Return a depthwise convolution, summed tap by tap: in float64 torch runs group by group."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    if len(weight) > x.shape[1]:
        x = x.repeat_interleave(len(weight) // x.shape[1], 1)
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    ends = [n - span for n, span in zip(x.shape[2:], spans, strict=True)]
    sizes = [(end - 1) // s + 1 for end, s in zip(ends, stride, strict=True)]
    y = x.new_zeros(*x.shape[:2], *sizes)
    for i, j in itertools.product(*map(range, weight.shape[2:])):
        top, left = i * dilation[0], j * dilation[1]
        seen = x[:, :, top : top + ends[0] : stride[0], left : left + ends[1] : stride[1]]
        y.addcmul_(seen, weight[:, 0, i, j].view(1, -1, 1, 1))
    return y if bias is None else y + bias.view(1, -1, 1, 1)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute in float64, also where a module's code names another floating dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", enabled=False), _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: on inputs as small as these, several mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
