"""The class of a module, also of one whose weight is parametrized.

`torch.nn.utils.parametrize` gives such a module a class of its own, derived from the module's, that
computes the weight.
"""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module without its parametrizations."""
    return parametrize.type_before_parametrizations(module)


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module in place; its parametrizations stay."""
    if parametrize.is_parametrized(module):
        own = type(module)
        members = {n: v for n, v in vars(own).items() if n not in ("__dict__", "__weakref__")}
        kind = type(own.__name__, (kind,), members)
    module.__class__ = kind


def generated_class(name: str, bases: tuple[type, ...], members: dict[str, Any]) -> type[nn.Module]:
    """Return a new class whose instances can be pickled, although it cannot be imported.

    Args:
        name: of the class.
        bases: of the class.
        members: of the class; `generated_by` is a function that can be imported, and its arguments,
            which returns such a class.
    """
    return cast(type[nn.Module], _metaclass(type(bases[-1]))(name, bases, members))


@cache
def _metaclass(base: type) -> Any:
    """Return a metaclass whose classes are pickled as the call that generates them."""
    made = type(base.__name__, (base,), {})
    copyreg.pickle(made, lambda kind: kind.generated_by)
    return made


@cache
def with_mixin(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same name with a mixin before it, always the same one."""
    return type(kind.__name__, (mixin, kind), {})
