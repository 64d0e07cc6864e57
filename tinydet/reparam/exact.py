"""Run networks in float64, whatever dtypes their code asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinydet.reparam.dataflow import decomposed
from tinydet.reparam.deep_copy import deep_copy
from tinydet.reparam.verify import map_tensors, tensors_in


def exact_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network in float64 on the CPU, with the tensors of plain attributes."""
    exact = deep_copy(model).cpu().double()
    for module in exact.modules():
        vars(module).update(map_tensors(plain_tensors(module), _in_float64))
    return exact


def plain_tensors(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that hold tensors and are no parameters or buffers."""
    return {n: v for n, v in vars(module).items() if n[0] != "_" and tensors_in(v)}


def _in_float64(x: Tensor) -> Tensor:
    return x.to("cpu", _exact(x.dtype))


class _Float64(TorchDispatchMode):
    """Makes every cast, factory and reduction with a floating or complex dtype use float64.

    Networks name such dtypes for mixed precision, or because a factory needs one. Here they would
    reduce the precision of checks, or meet float64 tensors in operations that refuse a mixture.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if (parts := decomposed(self, func, args, kwargs)) is not NotImplemented:
            return parts
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
