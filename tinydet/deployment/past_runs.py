"""The accuracy that past runs of an experiment reached, and the command that repeats them."""

from __future__ import annotations

import dataclasses
import glob
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinydet.config import Experiment
from tinydet.deployment.fold_checkpoint import assumed_classes
from tinydet.experiment_code import is_run_of
from tinydet.experiment_file import experiment_from_dict
from tinydet.report.run_folder import read_json
from tinydet.training.runs import RUNS


@dataclass(frozen=True)
class PastRuns:
    """An experiment's finished runs, which differ only in the seed.

    Attributes:
        ap50: of each run's best checkpoint, in 0..1, the newest run first.
        folder: the newest run's folder.
        experiment: what the newest run trained.
    """

    ap50: tuple[float, ...]
    folder: Path
    experiment: Experiment


def find_past_runs(experiment: Experiment, code: str = "", runs: Path = RUNS) -> PastRuns | None:
    """Return the newest finished run of this network and its repetitions with other seeds, or None.

    Unfinished runs and runs of a modified model (other than its initial weights) or of other code
    are ignored. Of two runs with the same seed the newer one counts.

    Args:
        experiment: runs are looked up by its name.
        code: `tinydet.experiment_code.experiment_code` of its file.
        runs: the folder of runs.
    """
    ap50s: dict[int, float] = {}
    newest: tuple[Path, Experiment] | None = None
    pattern = f"{glob.escape(experiment.name)}/*/metrics.json"
    for path in sorted(runs.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            metrics = read_json(path)
            ran = experiment_from_dict(read_json(path.parent / "experiment.json"))
            ap50, epochs = metrics["AP50"], metrics["epochs"]
            if not is_run_of(path.parent, code):
                continue
        except (ValueError, KeyError, TypeError):
            continue  # An incomplete run, or one of another version.
        if ap50 is None or epochs < ran.train.epochs or _network(ran) != _network(experiment):
            continue
        newest = newest or (path.parent, ran)
        if _without_seed(ran) == _without_seed(newest[1]):
            ap50s.setdefault(ran.train.seed, float(ap50))
    return PastRuns(tuple(ap50s.values()), *newest) if newest else None


def train_command(file: Path, experiment: Experiment, ran: Experiment) -> str:
    """Return the command line that repeats a run.

    Args:
        file: the experiment's file.
        experiment: the content of the file.
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


def _without_seed(experiment: Experiment) -> Experiment:
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
    """Return a value in the syntax of --set."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
