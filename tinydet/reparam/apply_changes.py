"""Apply changes to a network in rounds, and undo those that change its function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tinydet.reparam.dataflow import DataFlow, observe
from tinydet.reparam.norms import is_norm
from tinydet.reparam.report import Step
from tinydet.reparam.verify import copied, why_different


class RefusedError(ValueError):
    """A change cannot be made and the network is unmodified; the message says why."""


@dataclass(frozen=True)
class Change:
    """One change to a network.

    Attributes:
        name: what is changed; unique.
        touches: modules that no other change of the same round may touch.
        make: changes a network in place, or returns another one, and returns a description; raises
            `RefusedError`.
    """

    name: str
    touches: frozenset[nn.Module]
    make: Callable[[nn.Module], tuple[nn.Module, str]]


Finder = Callable[[nn.Module, DataFlow, Mapping[str, str]], list[Change]]
"""Proposes changes, given the network, its data flow, and the refused changes with the reasons."""


def apply_changes(
    model: nn.Module, checks: list[tuple[Any, ...]], find: Finder
) -> tuple[nn.Module, list[Step], dict[str, str]]:
    """Apply changes until no more are proposed.

    A change after which the network fails or computes a different function is undone.

    Args:
        model: the network in eval mode and float64; changed in place.
        checks: positional arguments of the forward passes that are compared; the data flow is
            observed on the first.
        find: proposes changes; called again after each round, as one change may enable another.

    Returns:
        The network (another object if it was replaced), the changes made, and the refused changes
        with the reasons.
    """
    done: list[Step] = []
    refused: dict[str, str] = {}
    flow = observe(model, checks[0], is_leaf=is_norm)
    references = [flow.returned, *(_output(model, inputs) for inputs in checks[1:])]
    one_by_one = False
    while True:
        last: list[Step] = []
        backup, known = copy.deepcopy(model), len(refused)
        taken: set[nn.Module] = set()
        for change in find(model, flow, refused):
            if change.name in refused or change.touches & taken or (one_by_one and last):
                continue
            try:
                model, what = change.make(model)
            except RefusedError as error:
                refused[change.name] = str(error)
                continue
            taken |= change.touches
            last.append(Step(change.name, what))
        if not last:
            if len(refused) == known:
                return model, done, refused
            continue  # `find` may propose another change in place of a refused one.
        try:
            flow = observe(model, checks[0], is_leaf=is_norm)
            outputs = [flow.returned, *(_output(model, inputs) for inputs in checks[1:])]
            problems = map(partial(why_different, backup), checks, references, outputs)
            problem = next(filter(None, problems), "")
        except Exception as error:
            # Other code of the network may depend on what was changed, and fail in any way.
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            problem = f"the network no longer runs ({what})"
        if problem:
            # Undo this round; from now on apply one change a round, to find the one at fault.
            model = backup
            flow = observe(model, checks[0], is_leaf=is_norm)
            if one_by_one:
                refused[last[0].name] = f"changed, {problem}"
            one_by_one = True
        else:
            done += last


def _output(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return model(*copied(inputs))
