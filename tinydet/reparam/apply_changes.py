"""Apply changes to a network in rounds, and undo those that change its function."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from tinydet.reparam.dataflow import DataFlow, observe
from tinydet.reparam.examples import Example
from tinydet.reparam.module_swap import Replacements, replace_modules
from tinydet.reparam.norms import is_norm
from tinydet.reparam.report import Step
from tinydet.reparam.snapshot import Snapshot
from tinydet.reparam.verify import difference, nudged, why_different

_SHOW_SECONDS = 5.0


class RefusedError(ValueError):
    """A change cannot be made and the network is unmodified; the message says why."""


@dataclass(frozen=True)
class Change:
    """One change to a network.

    Attributes:
        name: what is changed; unique.
        touches: modules that no other change of the same round may touch.
        make: makes the change; returns a description and the modules to replace by others. Raises
            `RefusedError`. It must assign new parameters instead of writing into existing ones.
    """

    name: str
    touches: frozenset[nn.Module]
    make: Callable[[], tuple[str, Replacements]]


Finder = Callable[[nn.Module, DataFlow, Mapping[str, str]], list[Change]]
"""Proposes changes, given the network, its data flow, and the refused changes with the reasons."""


@dataclass
class Network:
    """A network that is changed step by step, and the outputs that must stay.

    Attributes:
        model: the network in eval mode and float64.
        examples: inputs whose outputs are compared; the data flow is observed on the first.
        expected: the outputs for them.
        original: returns a new copy of the unchanged network.
        flow: the data flow of the network as it is now.
        where: whether a module of that name may be changed; None if all may.
        max_rel: the largest difference of the outputs that the last update found.
    """

    model: nn.Module
    examples: Sequence[Example]
    expected: Sequence[Any]
    original: Callable[[], nn.Module]
    flow: DataFlow
    where: Callable[[str, nn.Module], bool] | None = None
    max_rel: float = 0.0
    _begin: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._shown = self._begin

    def update(self) -> str:
        """Observe the network again; return how its outputs differ, empty if they do not."""
        try:
            self.flow = observe(self.model, self.examples[0], is_leaf=is_norm)
        except Exception as error:
            return _no_longer_runs(error)
        return self.why_different()

    def why_different(self) -> str:
        """Return how the network's outputs differ on all examples, empty if they do not."""
        self.max_rel = 0.0
        try:
            for number, (example, expected) in enumerate(
                zip(self.examples, self.expected, strict=True)
            ):
                found = example.run(self.model) if number else self.flow.returned
                if problem := why_different(expected, found, partial(self._nudged, example)):
                    return problem
                self.max_rel = max(self.max_rel, difference(expected, found).max_rel)
        except Exception as error:
            # Other code of the network may depend on what was changed, and fail in any way.
            return _no_longer_runs(error)
        return ""

    def _nudged(self, example: Example) -> Any:
        return example.mapped(nudged).run(self.original())

    def may_touch(self, modules: frozenset[nn.Module], names: Mapping[nn.Module, str]) -> bool:
        """Return whether all of some modules may be changed."""
        where = self.where
        return where is None or all(where(names[m], m) for m in modules if m in names)

    def say(self, what: str) -> None:
        """Show a step on the screen, every few seconds."""
        now = time.monotonic()
        if now - self._shown > _SHOW_SECONDS:
            self._shown = now
            sys.stderr.write(f"fold: at {what}, {now - self._begin:.0f} s so far\n")


def _no_longer_runs(error: Exception) -> str:
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"the network no longer runs ({what})"


def apply_changes(network: Network, find: Finder) -> tuple[list[Step], dict[str, str]]:
    """Apply changes until no more are proposed.

    A change after which the network fails or computes a different function is undone.

    Args:
        network: changed in place.
        find: proposes changes; called again after each round, as one change may enable another.

    Returns:
        The changes made, and the refused changes with the reasons.
    """
    done: list[Step] = []
    refused: dict[str, str] = {}
    most = sys.maxsize  # changes in a round
    while True:
        known = len(refused)
        proposed = find(network.model, network.flow, refused)
        proposed = [change for change in proposed if change.name not in refused]
        if not proposed:
            return done, refused
        snapshot = Snapshot(network.model)
        names = {module: name for name, module in network.model.named_modules()}
        last: list[Step] = []
        replacements: dict[nn.Module, nn.Module | None] = {}
        taken: set[nn.Module] = set()
        for change in proposed:
            if change.touches & taken or len(last) >= most:
                continue
            if not network.may_touch(change.touches, names):
                refused[change.name] = "it is outside of the part to fold"
                continue
            network.say(change.name)
            try:
                what, replaced = change.make()
            except RefusedError as error:
                refused[change.name] = str(error)
                continue
            taken |= change.touches
            replacements.update(replaced)
            last.append(Step(change.name, what))
        if not last:
            if len(refused) == known:
                return done, refused
            continue  # `find` may propose another change in place of a refused one.
        replace_modules(network.model, replacements)
        problem = network.update()
        if not problem:
            done += last
            most = min(2 * most, sys.maxsize)
            continue
        # Undo this round and make fewer changes at a time, to find the one at fault.
        snapshot.restore()
        network.flow = observe(network.model, network.examples[0], is_leaf=is_norm)
        if len(last) == 1:
            refused[last[0].name] = f"changed, {problem}"
        most = max(1, len(last) // 2)
