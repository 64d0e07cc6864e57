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
    return x.cpu().double() if x.is_floating_point() else x.cpu()


class _CastsToFloat64(TorchDispatchMode):
    """Makes `x.float()` and the like cast to float64.

    Networks contain such casts for mixed precision; here they would reduce the precision of checks.
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
        dtype = kwargs.get("dtype")
        if func.overloadpacket is torch.ops.aten._to_copy and dtype and dtype.is_floating_point:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute in float64, also where a module's code creates tensors of the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", enabled=False), _CastsToFloat64():
            yield
    finally:
        torch.set_default_dtype(default)
