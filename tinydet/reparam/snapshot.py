"""Undo changes to a network's modules without a copy of its weights."""

from __future__ import annotations

from typing import Any

from torch import nn


class Snapshot:
    """The modules of a network, their classes, attributes, weights and hooks at one moment.

    Tensors are referred to and not copied: changes must assign new parameters instead of writing
    into existing ones.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note the state of all modules of a network."""
        self._modules = [(m, type(m), dict(vars(m))) for m in model.modules()]
        self._containers: dict[int, tuple[Any, Any]] = {}
        for _, _, attributes in self._modules:
            for value in attributes.values():
                if isinstance(value, (list, tuple, dict, set)):
                    self._note(value)

    def _note(self, value: Any) -> None:
        if isinstance(value, (list, dict, set)) and id(value) not in self._containers:
            self._containers[id(value)] = (value, value.copy())
        items = value.values() if isinstance(value, dict) else value
        for item in items if isinstance(value, (list, tuple, dict)) else ():
            if isinstance(item, (list, tuple, dict, set)):
                self._note(item)

    def restore(self) -> None:
        """Return all modules to their state at that moment."""
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in self._containers.values():
            # In place: handles of hooks refer to these very objects.
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
