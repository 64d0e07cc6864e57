"""The models that the folding benchmarks run on: timm's, and "torchvision/..." of torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import timm_models
import torchvision_models
from timm_models import CLASSIFIER
from torch import nn
from torchvision_models import PREFIX

SAMPLE = Path(__file__).with_name("timm_models.txt")
"""A line for each model, its name and the side of its input in pixels."""
OTHER = Path(__file__).with_name("other_models.txt")
"""The same for models that the fold was not developed on."""


def choose_models(patterns: Sequence[str], listed: Path | None = None) -> list[str]:
    """Return the models whose names match any of the patterns, sorted.

    Args:
        patterns: like "rexnet*", "rexnet_100:classifier" or "torchvision/fcn*"; none for all that
            are listed.
        listed: a file of names to choose from, like `SAMPLE`, which is what none stands for where
            there is no pattern either; with patterns, none stands for every model there is.

    Raises:
        ValueError: a pattern matches no model.
    """
    if listed is not None or not patterns:
        known = list(_sides(listed or SAMPLE))
    else:
        own = timm.list_models()
        known = [*own, *(name + CLASSIFIER for name in own), *torchvision_models.names()]
    chosen: set[str] = set() if patterns else set(known)
    for pattern in patterns:
        found = [name for name in known if _matches(name, pattern)]
        if not found:
            raise ValueError(f"{pattern}: no such model; try '*{pattern}*'")
        chosen.update(found)
    return sorted(chosen)


def _matches(name: str, pattern: str) -> bool:
    # "res*" means the feature maps alone.
    plain = (CLASSIFIER in name) == (CLASSIFIER in pattern) and (PREFIX in name) == (
        PREFIX in pattern
    )
    return plain and fnmatchcase(name, pattern)


def family_of(name: str) -> str:
    """Return the name of the module that defines a model."""
    return torchvision_models.family_of(name) if _foreign(name) else timm_models.family_of(name)


def input_sizes(name: str) -> list[int]:
    """Return the input sides to try, in pixels, best first."""
    sides = {**_sides(OTHER), **_sides(SAMPLE)}
    if name in sides:
        return [sides[name]]
    return [224] if _foreign(name) else timm_models.input_sizes(name)


def build_model(name: str, side: int) -> nn.Module:
    """Return a model in eval mode, float32, with weights that only its name decides.

    Args:
        name: of the model.
        side: of the input in pixels, for models that are built for one size.

    Raises:
        ValueError: there is no such model.
    """
    if _foreign(name):
        return torchvision_models.build_model(name, side)
    return timm_models.build_model(name)


def example_inputs(name: str, batch: int, height: int, width: int) -> tuple[Any, ...]:
    """Return a model's positional arguments: float32 noise that only the arguments decide."""
    if _foreign(name):
        return torchvision_models.example_inputs(name, batch, height, width)
    return (timm_models.example_images(name, batch, height, width),)


def _foreign(name: str) -> bool:
    return name.startswith(PREFIX)


def _sides(path: Path) -> dict[str, int]:
    return {name: int(side) for name, side in map(str.split, path.read_text().splitlines())}
