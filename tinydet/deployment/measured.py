"""What runs have measured: the accuracy of an experiment, and the command that measured it."""

from __future__ import annotations

import dataclasses
import glob
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinydet.config import Experiment
from tinydet.deployment.forms import assumed_classes
from tinydet.experiment_file import experiment_from_dict
from tinydet.training.runs import RUNS


@dataclass(frozen=True)
class Measured:
    """The accuracy of an experiment's finished runs, which differ in nothing but the seed.

    Attributes:
        ap50: of each run's best checkpoint, in 0..1, the newest run first.
        run: the newest run's folder.
        experiment: as the newest was run.
    """

    ap50: tuple[float, ...]
    run: Path
    experiment: Experiment


def newest_measured(experiment: Experiment, runs: Path = RUNS) -> Measured | None:
    """Return the newest finished run of this very network and the same with other seeds, or None.

    A run that was killed, or whose model was changed (but for the weights it began from), says
    nothing about the experiment. Of two runs with the same seed the newer counts.

    Args:
        experiment: runs are looked for under its name.
        runs: the folder of runs.
    """
    ap50s: dict[int, float] = {}
    newest: tuple[Path, Experiment] | None = None
    pattern = f"{glob.escape(experiment.name)}/*/metrics.json"
    for path in sorted(runs.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            metrics = json.loads(path.read_text())
            values = json.loads((path.parent / "experiment.json").read_text())
            ran = experiment_from_dict(values)
            ap50, epochs = metrics["AP50"], metrics["epochs"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # Not a whole run, or one of another version.
        if ap50 is None or epochs < ran.train.epochs or _network(ran) != _network(experiment):
            continue
        newest = newest or (path.parent, ran)
        if _but_for_the_seed(ran) == _but_for_the_seed(newest[1]):
            ap50s.setdefault(ran.train.seed, float(ap50))
    return Measured(tuple(ap50s.values()), *newest) if newest else None


def train_command(file: Path, experiment: Experiment, ran: Experiment) -> str:
    """Return the command line that runs an experiment file as it was run.

    Args:
        file: the experiment's file.
        experiment: what the file holds.
        ran: what was run.
    """
    words = ["python", "tools/train.py", str(file)]
    before = dict(_fields(experiment))
    changed = [
        f"{name}={_text(value)}"
        for name, value in _fields(ran)
        if name != "name" and value != before[name]
    ]
    return shlex.join([*words, "--set", *changed] if changed else words)


def _but_for_the_seed(experiment: Experiment) -> Experiment:
    return replace(experiment, name="", train=replace(experiment.train, seed=0))


def _network(experiment: Experiment) -> tuple[Any, int]:
    return replace(experiment.model, weights="random"), len(assumed_classes(experiment))


def _fields(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _text(value: Any) -> str:
    """Return a value as --set reads it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
