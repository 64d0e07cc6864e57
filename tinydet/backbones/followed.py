"""A layer behind a module, inside that module: no name, hook or weight of the network changes."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx, nn

_FOLLOWERS = "_followers"


def follow(module: nn.Module, layer: nn.Module, name: str) -> None:
    """Make a module return what a layer makes of its output.

    The layer becomes a child of the module, which takes a subclass of its own class: all other
    names, weights, hooks and references stay valid. Copying, pickling, `torch.fx`, `torch.export`
    and `torch.compile` work as before.

    Args:
        module: returns one tensor; it is changed in place.
        layer: takes that tensor.
        name: of the child; a number is added if it is taken.

    Raises:
        ValueError: the module's code is a graph of its own (as `fold` makes them).
    """
    if isinstance(module, fx.GraphModule):
        raise ValueError(
            f"{type(module).__name__} is a torch.fx graph, perhaps from fold; add layers before"
        )
    taken = {key for key in dir(module) if key.startswith(name)}
    child = next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in taken)
    module.add_module(child, layer.train(module.training))
    module.__dict__[_FOLLOWERS] = (*followers(module), child)
    # Another class and not another module, as expanded convs do it.
    if not _is_followed(module):
        module.__class__ = _followed_class(type(module))


def followers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the children that run behind the module's own code."""
    return module.__dict__.get(_FOLLOWERS, ())


def take_followers(old: nn.Module, new: nn.Module) -> None:
    """Give the layers behind a module to its replacement, under the same names."""
    for name in followers(old):
        follow(new, getattr(old, name), name)


def _is_followed(module: nn.Module) -> bool:
    return hasattr(type(module), "followed")


@functools.cache
def _followed_class(base: type[nn.Module]) -> type[nn.Module]:
    # With the signature of the original: fold looks at it before it traces the code.
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names = followers(self)
        # A container runs all its children: its own code must not see these.
        body = base.__new__(base)
        own = {name: child for name, child in self._modules.items() if name not in names}
        body.__dict__.update(vars(self), _modules=own)
        y = base.forward(body, *args, **kwargs)
        for name in names:
            y = self._modules[name](y)
        return y

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # The class has no place in any file: pickle stores the original's.
        return (_blank, (base,), *base.__reduce_ex__(self, protocol)[2:])

    members = {"forward": forward, "__reduce_ex__": reduce, "followed": base}
    return type(f"Followed{base.__name__}", (base,), members)


def _blank(base: type[nn.Module]) -> nn.Module:
    kind = _followed_class(base)
    return kind.__new__(kind)
