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
    """The accuracy of a finished run.

    Attributes:
        ap50: of its best checkpoint, in 0..1.
        run: the run's folder.
        experiment: as it was run.
    """

    ap50: float
    run: Path
    experiment: Experiment


def newest_measured(experiment: Experiment, runs: Path = RUNS) -> Measured | None:
    """Return the newest finished run of this very network, or None if there is none.

    A run that was killed, or whose model was changed (but for the weights it began from), says
    nothing about the experiment.

    Args:
        experiment: runs are looked for under its name.
        runs: the folder of runs.
    """
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
        return Measured(float(ap50), path.parent, ran)
    return None


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
