"""Run a network in float64, whatever dtypes its code asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
    """Compute in float64, also where a module's code names another floating dtype.

    Uses one thread: on inputs this small, several mostly wait for each other.
    """
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", enabled=False), _Float64():
            yield
    finally:
        torch.set_default_dtype(default)
        torch.set_num_threads(threads)
