"""Layers appended to a module from inside, without changing any name, hook or weight around it."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx, nn

from tinydet.reparam.module_class import generated_class

_APPENDED = "_appended_layers"


def append_layer(module: nn.Module, layer: nn.Module, name: str) -> None:
    """Make a module pass its output through a layer.

    The layer becomes a child of the module, and the module's class is replaced by a generated
    subclass whose forward runs the layer last, as in `torch.nn.utils.parametrize`. A wrapper module
    would change names and references, and a forward hook would keep the module from being folded.
    Copying, pickling, `torch.fx`, `torch.export` and `torch.compile` work as before.

    Args:
        module: returns one tensor; modified in place.
        layer: takes that tensor.
        name: name of the child; a number is added if it is taken.

    Raises:
        ValueError: the module is a `torch.fx.GraphModule`, or its `forward` was replaced.
    """
    if isinstance(module, fx.GraphModule) or "forward" in vars(module):
        raise ValueError(
            f"{type(module).__name__} does not run the code of its class, as a torch.fx graph; add "
            "layers to the network that it was made from"
        )
    taken = {key for key in dir(module) if key.startswith(name)}
    child = next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in taken)
    module.add_module(child, layer.train(module.training))
    module.__dict__[_APPENDED] = (*appended_layers(module), child)
    kind: Any = type(module)
    if not hasattr(kind, "original_class"):
        module.__class__ = _subclass(kind)


def appended_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the children that were appended to a module, in order."""
    return module.__dict__.get(_APPENDED, ())


def move_appended_layers(old: nn.Module, new: nn.Module) -> None:
    """Append the layers appended to a module to its replacement, under the same names."""
    for name in appended_layers(old):
        append_layer(new, getattr(old, name), name)


@functools.cache
def _subclass(base: Any) -> Any:
    # With the original's signature, which fold inspects before tracing.
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names = appended_layers(self)
        # The original code must not see the appended layers: a container would run them.
        body = base.__new__(base)
        own = {name: child for name, child in self._modules.items() if name not in names}
        body.__dict__.update(vars(self), _modules=own)
        y = base.forward(body, *args, **kwargs)
        for name in names:
            y = self.get_submodule(name)(y)
        return y

    members = {"forward": forward, "original_class": base, "generated_by": (_subclass, (base,))}
    return generated_class(f"Appended{base.__name__}", (base,), members)
