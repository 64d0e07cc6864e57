"""Try one small model of every family of timm's as a backbone, and print which fit as a table.

A family is a module of timm's. Weights are random; nothing is trained or fetched. The whole takes
some minutes. Run from the project's root: python tests/benchmarks/backbones_that_fit.py [MODEL ...]
"""

from __future__ import annotations

import re
import sys
from collections import Counter

import timm
import torch

from tinydet.backbones.factory import create_backbone
from tinydet.config import ConfigError
from tinydet.reparam.zoo_models import family_of

FEATURES = ("C5", "C4", "DC5")
SMALL = re.compile(r"atto|nano|tiny|small|xxs|_xs|_s\b|_s_|_050|_18|18$|_t0|_b0|_m0|_ti_")
MILLIONS = (8, 30)  # the first model up to this size, else the smallest up to that


def small_model(family: str) -> str | None:
    """Return a small model of a family, None where all have more than 30 M parameters."""
    names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
    best, fewest = None, MILLIONS[1]
    for name in sorted(names, key=lambda name: SMALL.search(name) is None):
        with torch.device("meta"):
            parameters = timm.create_model(name).parameters()
        millions = sum(parameter.numel() for parameter in parameters) / 1e6
        if millions <= fewest:
            best, fewest = name, millions
        if fewest <= MILLIONS[0]:
            break
    return best


def outcome(name: str, feature: str) -> str:
    """Return "yes", or why a model cannot be the backbone."""
    try:
        create_backbone(name, "random", feature)
    except ConfigError as error:
        reason = str(error).removeprefix(f"model.backbone={name}: ")
        if found := re.search(r"must have the shape (.*)\. Choose", reason):
            return f"some sizes only: {found[1]}"
        if strides := re.search(r"its strides are (.*)", reason):
            return f"no such stride: {strides[1]}"
        return "not dilated" if "cannot dilate" in reason else reason
    except Exception as error:
        return f"FAULT, not refused: {type(error).__name__}: {error}"
    return "yes"


def main() -> None:
    """Print a row for each family, or for each model that is named, and the totals."""
    print("| family | model | " + " | ".join(FEATURES) + " |")
    print("|---" * (2 + len(FEATURES)) + "|", flush=True)
    totals = {feature: Counter() for feature in FEATURES}
    named = [(family_of(name), name) for name in sys.argv[1:]]
    for family, name in named or ((family, small_model(family)) for family in timm.list_modules()):
        if name is None:
            print(f"| {family} | all over {MILLIONS[1]} M parameters, not tried |", flush=True)
            continue
        found = [outcome(name, feature) for feature in FEATURES]
        print(f"| {family} | {name} | " + " | ".join(found) + " |", flush=True)
        for feature, word in zip(FEATURES, found, strict=True):
            totals[feature][word.split(":")[0]] += 1
    for feature, words in totals.items():
        print(f"\n{feature}: " + ", ".join(f"{n} {word}" for word, n in words.most_common()))


if __name__ == "__main__":
    main()
