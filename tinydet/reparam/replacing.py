"""A module replaced by another, which takes over its forward hooks.

timm taps feature maps by hooks: they must survive on the replacement, and must not fire while a
block is tried out alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, under every name it has in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def has_pre_hooks(module: nn.Module) -> bool:
    """Return whether something runs before the module's forward."""
    return bool(module._forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Return whether something runs before or after the module's forward."""
    return bool(module._forward_hooks) or has_pre_hooks(module)


def give_hooks(old: nn.Module, new: nn.Module) -> None:
    """Add the hooks of a module to those of its replacement."""
    own = has_hooks(new)
    for table in HOOK_TABLES:
        if own:
            getattr(new, table).update(getattr(old, table))
        else:
            # The very table: the handles that timm's feature hooks keep point to it.
            setattr(new, table, getattr(old, table))


@contextmanager
def hooks_off(module: nn.Module) -> Iterator[None]:
    """Take the module's own hooks (not its children's) off for a while."""
    saved = {table: getattr(module, table) for table in HOOK_TABLES}
    try:
        for table, hooks in saved.items():
            setattr(module, table, type(hooks)())
        yield
    finally:
        for table, hooks in saved.items():
            setattr(module, table, hooks)


@contextmanager
def calls_recorded(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Any, Any, Any]]]:
    """Record (args, kwargs, output) of the forward in each module's first call, as copies.

    These are what `forward` itself takes and returns: after pre-hooks and before other hooks.
    """
    records: dict[nn.Module, tuple[Any, Any, Any]] = {}
    arguments: dict[nn.Module, tuple[Any, Any]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in arguments:
            arguments[module] = (_copied(args), _copied(kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        del args
        if module not in records:
            records[module] = (*arguments[module], _copied(output))

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, prepend=True))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    copy: Callable[..., Any] | None = getattr(value, "clone", None)
    if copy is not None:
        return copy()
    if isinstance(value, dict):
        return type(value)((k, _copied(v)) for k, v in value.items())
    if type(value) in (tuple, list):
        return type(value)(_copied(v) for v in value)
    return value
