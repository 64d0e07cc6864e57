"""Replace modules, and handle their forward hooks.

timm extracts feature maps by hooks: the replacement must keep them, and they must not run while a
block is executed alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tinydet.reparam.verify import copied

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


Replacements = Mapping[nn.Module, nn.Module | None]


def replace_modules(model: nn.Module, replacements: Replacements) -> None:
    """Replace modules, under every name they have and in every attribute of the model.

    Lists, tuples and dicts that hold them are replaced by others, not changed.
    """
    for module in model.modules():
        if module in replacements or isinstance(module, torch.jit.ScriptModule):
            continue
        for name, child in module._modules.items():
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]
        for name, value in vars(module).items():
            if name[0] != "_" and isinstance(value, (nn.Module, dict, list, tuple)):
                module.__dict__[name] = with_replaced(value, replacements)


def with_replaced(value: Any, replacements: Replacements) -> Any:
    """Return a value with modules replaced in nested lists, tuples and dicts.

    It is the value itself if it holds none of them.
    """
    if isinstance(value, nn.Module):
        return replacements.get(value, value)
    if isinstance(value, dict):
        items = {k: with_replaced(v, replacements) for k, v in value.items()}
        if all(items[k] is v for k, v in value.items()):
            return value
        changed = copy.copy(value)
        changed.update(items)
        return changed
    if isinstance(value, (list, tuple)):
        parts = [with_replaced(v, replacements) for v in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def has_hooks(module: nn.Module) -> bool:
    """Return whether something may run before or after the module's forward.

    So it may in TorchScript, which may have hooks of its own.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def give_hooks(old: nn.Module, new: nn.Module) -> None:
    """Add the hooks of a module to those of its replacement."""
    own = has_hooks(new)
    for table in HOOK_TABLES:
        if own:
            getattr(new, table).update(getattr(old, table))
        else:
            # Share the dict itself: the handles of timm's feature hooks refer to it.
            setattr(new, table, getattr(old, table))


@contextmanager
def hooks_disabled(module: nn.Module) -> Iterator[None]:
    """Disable the module's own hooks (not its children's) within the context."""
    saved = {table: getattr(module, table) for table in HOOK_TABLES}
    try:
        for table, hooks in saved.items():
            setattr(module, table, type(hooks)())
        yield
    finally:
        for table, hooks in saved.items():
            setattr(module, table, hooks)


@contextmanager
def record_calls(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Any, Any, Any]]]:
    """Record copies of (args, kwargs, output) of `forward` in each module's first call.

    They are recorded after other pre-hooks and before other forward hooks; of TorchScript, which
    takes no hooks, none are recorded.
    """
    records: dict[nn.Module, tuple[Any, Any, Any]] = {}
    arguments: dict[nn.Module, tuple[Any, Any]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in arguments:
            arguments[module] = (copied(args), copied(kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        del args
        if module not in records:
            records[module] = (*arguments[module], copied(output))

    handles = []
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, prepend=True))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
