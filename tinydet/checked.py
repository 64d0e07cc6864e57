"""Dataclasses that check their values: each field states its type, bounds and description once."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

_ONE = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
_MANY = {int: "whole numbers", float: "finite numbers", str: "names"}


class ConfigError(ValueError):
    """A field, value or experiment file is wrong; the message says which and what to do."""


@dataclass(frozen=True)
class Rule:
    """What a value of the right type has to satisfy.

    Attributes:
        holds: whether it does.
        words: what to do otherwise.
    """

    holds: Callable[[Any], bool]
    words: str


def _are_distinct(names: tuple[str, ...]) -> bool:
    plain = [" ".join(name.split()) for name in names]
    return all(plain) and len(set(plain)) == len(plain)


NOT_EMPTY = Rule(bool, "must have at least one item")
ASCENDING = Rule(lambda pair: pair[0] <= pair[1], "the smaller factor comes first")
DISTINCT = Rule(_are_distinct, "each name must be another one, and none empty")
FOLDER_NAME = Rule(
    lambda name: name not in (".", "..") and not set("/\\") & set(name),
    "must be the name of a folder, without slashes",
)


def option(
    default: Any,
    description: str,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    above: float = -math.inf,
    rule: Rule | None = None,
) -> Any:
    """Return a dataclass field of a `Checked` class.

    Args:
        default: value of the field where none is given.
        description: what the field means, with its unit.
        at_least: smallest value of a number, or of each item of a tuple.
        at_most: largest value.
        above: the value has to be larger than this.
        rule: what else the value has to satisfy.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "above": above}
    return field(default=default, metadata={"description": description, **bounds, "rule": rule})


class Checked:
    """Base of frozen dataclasses whose fields are `option`s, or other `Checked` groups.

    Ints become floats, and lists become tuples, where the field is declared so.

    Args:
        path: path of the class's fields in an experiment, e.g. "data.augment"; for messages.

    Raises:
        ConfigError: a value has the wrong type or is out of bounds.
    """

    _path = ""

    def __init_subclass__(cls, path: str = "") -> None:
        cls._path = path

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for name, metadata in _metadata(self).items():
            value = getattr(self, name)
            try:
                value = _convert(value, types[name], metadata)
            except (ValueError, OverflowError):
                near = _nearest(value, types[name])
                self.refuse(name, f"must be {_in_words(types[name], metadata)}{near}")
            object.__setattr__(self, name, value)
            rule = metadata.get("rule")
            if rule is not None and not rule.holds(value):
                self.refuse(name, rule.words)

    def refuse(self, name: str, rule: str) -> typing.NoReturn:
        """Raise the ConfigError that says what the value of a field must be."""
        path = f"{self._path}.{name}" if self._path else name
        raise ConfigError(f"{path}={getattr(self, name)!r}: {rule}")


def field_types(cls: type) -> dict[str, Any]:
    """Return the declared type of each field of a dataclass, by its name."""
    return typing.get_type_hints(cls)


def allowed(cls: type, name: str) -> str:
    """Return in words which values a field of a `Checked` class takes, e.g. "a whole number"."""
    return _in_words(field_types(cls)[name], _metadata(cls)[name])


def _metadata(group: Any) -> dict[str, Mapping[str, Any]]:
    return {f.name: f.metadata for f in fields(group)}


def _in_words(kind: Any, metadata: Mapping[str, Any]) -> str:
    items = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(items)}"
    if "at_least" not in metadata:
        return f"of type {kind.__name__}"
    low, high, above = metadata["at_least"], metadata["at_most"], metadata["above"]
    if math.isfinite(above):
        limits = f"greater than {above:g}"
    elif math.isfinite(high):
        limits = f"from {low:g} to {high:g}"
    else:
        limits = f"at least {low:g}" if math.isfinite(low) else ""
    if typing.get_origin(kind) is tuple:
        count = "" if Ellipsis in items else f"{len(items)} "
        return f"{count}{_MANY[items[0]]}" + (f", each {limits}" if limits else "")
    return f"{_ONE[kind]}, {limits}" if limits else _ONE[kind]


def _nearest(value: Any, kind: Any) -> str:
    choices = [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
    near = difflib.get_close_matches(str(value), choices, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _convert(value: Any, kind: Any, metadata: Mapping[str, Any]) -> Any:
    """Return a value in a field's declared type.

    Raises:
        ValueError, OverflowError: the value is not allowed.
    """
    items = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        right = value in items
    elif typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        kinds = [items[0]] * len(value) if Ellipsis in items else items
        return tuple(_convert(v, k, metadata) for v, k in zip(value, kinds, strict=True))
    elif kind in (int, float):
        right = isinstance(value, (int, kind)) and not isinstance(value, bool)
        value = kind(value) if right else value
        right = right and metadata["at_least"] <= value <= metadata["at_most"]
        right = right and value > metadata["above"] and (kind is int or math.isfinite(value))
    else:
        right = isinstance(kind, type) and isinstance(value, kind)
    if not right:
        raise ValueError
    return value
