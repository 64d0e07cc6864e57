"""Base of the modes that see, or change, every operation that torch runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """Calls `run` for each operation inside a `with` block, after torch has decomposed it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # To keep torch.compile out takes longer than many an operation.

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            # In this mode torch does not decompose composite operations by itself.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and return its result."""
        raise NotImplementedError
