"""Changes to a network made in rounds; after each the whole network must still be the function."""

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
    """A change cannot be made, and nothing was; the message says why."""


@dataclass(frozen=True)
class Change:
    """One change to a network.

    Attributes:
        name: what is changed, unlike any other change's.
        touches: modules that no other change of the same round may touch.
        make: changes a network in place, or returns another one, and says what was done; raises
            `RefusedError`.
    """

    name: str
    touches: frozenset[nn.Module]
    make: Callable[[nn.Module], tuple[nn.Module, str]]


Finder = Callable[[nn.Module, DataFlow, Mapping[str, str]], list[Change]]
"""Given the network, its data flow, and the refused changes with the reasons: what to change."""


def change_in_rounds(
    model: nn.Module, checks: list[tuple[Any, ...]], find: Finder
) -> tuple[nn.Module, list[Step], dict[str, str]]:
    """Make changes until there are no more to make.

    A change after which the network does not run, or is another function, is undone.

    Args:
        model: the network in eval mode and float64; changed in place.
        checks: positional arguments of the forward passes that are compared; the first are for
            the observed one.
        find: proposes changes, again after each round: one change may bring about another.

    Returns:
        The network (another object if it was replaced), what was done, and what was refused with
        the reasons.
    """
    done: list[Step] = []
    refused: dict[str, str] = {}
    flow = observe(model, checks[0], is_leaf=is_norm)
    references = [flow.returned, *(_answer(model, inputs) for inputs in checks[1:])]
    one_by_one = False
    while True:
        backup, last, known = copy.deepcopy(model), [], len(refused)
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
            continue  # What was refused may be done in another way.
        try:
            flow = observe(model, checks[0], is_leaf=is_norm)
            answers = [flow.returned, *(_answer(model, inputs) for inputs in checks[1:])]
            problems = map(partial(why_different, backup), checks, references, answers)
            problem = next(filter(None, problems), "")
        except Exception as error:
            # Code elsewhere may use what was changed in any way, and fail in any.
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            problem = f"the network no longer runs ({what})"
        if problem:
            # Back to before this round, and from now on one by one: which of them was it?
            model = backup
            flow = observe(model, checks[0], is_leaf=is_norm)
            if one_by_one:
                refused[last[0].name] = f"changed, {problem}"
            one_by_one = True
        else:
            done += last


def _answer(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return model(*copied(inputs))
