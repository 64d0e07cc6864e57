"""The plan of a comparison: how many epochs the budget buys each experiment, and in which dtype.

The plan is made once and kept in the comparison's folder. A restarted comparison reads it, so that
slightly different step times do not lead to different runs; other comparisons reuse its entries for
the same experiment.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinydet.atomic import create_text
from tinydet.comparison.budget import Budget
from tinydet.config import ConfigError, Experiment
from tinydet.data.dataset import load_split
from tinydet.deployment.flops import count
from tinydet.deployment.images import largest_input, random_images
from tinydet.experiment_code import experiment_code
from tinydet.experiment_file import experiment_to_dict, load_experiment
from tinydet.report.run_folder import read_json
from tinydet.training.checkpoint import build_unloaded
from tinydet.training.device import describe_device, pick_device
from tinydet.training.profile import time_steps
from tinydet.training.runs import RUNS

logger = logging.getLogger(__name__)

COMPARISONS = RUNS / "compare"
_FILE = "plan.json"
_DECIDED = {
    "train.epochs": "they follow from --budget",
    "train.seed": "it runs from 0; give --seeds",
    "train.eval_every": "the last epoch alone is evaluated",
}
_SAME_DATA = ("root", "source", "train_split", "test_split", "classes")


@dataclass(frozen=True)
class PlannedRun:
    """How one experiment is trained within the budget.

    Attributes:
        key: hash of the experiment without its name, of its code, the budget and the machine.
        epochs: number of epochs.
        dtype: "auto" resolved.
        memory_format: "auto" resolved.
        reason: how the number of epochs was found.
    """

    key: str
    epochs: int
    dtype: str
    memory_format: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A planned comparison.

    Attributes:
        folder: folder of the comparison.
        budget: budget of each run.
        files: experiment files, the base first.
        experiments: experiments as they are trained, except for the seed.
        reasons: how each number of epochs was found.
        codes: hash of each experiment's code, "" for those that have none.
    """

    folder: Path
    budget: Budget
    files: tuple[Path, ...]
    experiments: tuple[Experiment, ...]
    reasons: tuple[str, ...]
    codes: tuple[str, ...]


def load_experiments(files: Sequence[Path], overrides: Sequence[str]) -> list[Experiment]:
    """Read experiments that can be compared.

    Args:
        files: the base, then the ideas.
        overrides: "a.b=value" for all of them.

    Raises:
        ConfigError: a file is wrong or given twice, two experiments differ in their data, or an
            override is of what the comparison decides.
    """
    for text in overrides:
        if reason := _DECIDED.get(text.partition("=")[0].strip()):
            raise ConfigError(f"--set {text}: a comparison decides this itself: {reason}")
    if len(files) < 2:
        raise ConfigError("give the base and at least one idea: BASE.py IDEA.py")
    experiments = [load_experiment(file, overrides) for file in files]
    base = experiments[0]
    for i, (file, experiment) in enumerate(zip(files, experiments, strict=True)):
        for other_file, other in zip(files[:i], experiments[:i], strict=True):
            if file.resolve() == other_file.resolve():
                raise ConfigError(
                    f"{file}: given twice; to compare it with itself, copy it to another name"
                )
            if experiment.name == other.name:
                raise ConfigError(
                    f"{file}: named {other.name!r} like {other_file}, but runs are stored by name; "
                    "rename one"
                )
        for name in _SAME_DATA:
            own, of_base = getattr(experiment.data, name), getattr(base.data, name)
            if own != of_base:
                raise ConfigError(
                    f"{file}: data.{name} is {own!r}, but the base {files[0]} has {of_base!r}; "
                    "compare on the same data"
                )
    return experiments


def make_plan(
    files: Sequence[Path],
    experiments: Sequence[Experiment],
    budget: Budget,
    folder: Path | None = None,
) -> Plan:
    """Read the comparison's plan from its folder, or make and write it.

    Args:
        files: experiment files.
        experiments: their content, from `load_experiments`.
        budget: budget of each run.
        folder: folder of the comparison; None is `runs/compare/<base>-<hash of the comparison>/`.

    Raises:
        ValueError: an experiment cannot be built or trained, the budget is smaller than one epoch,
            or the folder holds another comparison.
    """
    where = describe_device(pick_device(experiments[0].train.device))
    codes = tuple(experiment_code(file) for file in files)
    coded = list(zip(experiments, codes, strict=True))
    keys = [_key(experiment, code, budget, where) for experiment, code in coded]
    names = [experiment.name for experiment in experiments]
    mark = _hash([names, [_key(experiment, code, budget) for experiment, code in coded]])
    folder = folder or COMPARISONS / f"{names[0]}-{mark}"
    if read_json(folder / _FILE) is None:
        earlier = _earlier_plans()
        for key, experiment in zip(keys, experiments, strict=True):
            if key not in earlier:
                earlier[key] = plan_run(experiment, budget, key)
        content = {
            "mark": mark,
            "budget": budget.text,
            "made_on": where,
            "files": [str(file) for file in files],
            "schedules": {n: asdict(earlier[key]) for n, key in zip(names, keys, strict=True)},
        }
        # Shards that start together all time their steps, and all take the first one's plan.
        create_text(folder / _FILE, json.dumps(content, indent=2) + "\n")
    known = read_json(folder / _FILE)
    if not isinstance(known, dict) or known.get("mark") != mark:
        raise ValueError(
            f"--out {folder}: holds another comparison, of other experiments, other code or "
            "another budget; give another folder"
        )
    try:
        runs = [PlannedRun(**values) for values in known["schedules"].values()]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{folder / _FILE}: is damaged, or of another version; remove it"
        ) from None
    planned = tuple(_as_planned(*pair) for pair in zip(experiments, runs, strict=True))
    return Plan(folder, budget, tuple(files), planned, tuple(run.reason for run in runs), codes)


def plan_run(experiment: Experiment, budget: Budget, key: str = "") -> PlannedRun:
    """Find out how many epochs a budget buys; unless it is one of epochs, steps are timed.

    Raises:
        ValueError: the experiment cannot be built or trained, or one epoch is more.
    """
    logger.info(f"{experiment.name}: timing a few training steps")
    timed = time_steps(experiment, 20 if budget.unit == "seconds" else 1)
    images = timed.steps_an_epoch * experiment.train.batch_size
    if budget.unit == "seconds":
        cost = timed.seconds * timed.steps_an_epoch
        reason = f"{timed.steps_an_epoch} steps of {timed.seconds:.3g} s per epoch"
    elif budget.unit == "multiply-adds":
        adds = _multiply_adds(experiment)
        cost = float(adds) * images
        reason = f"{images} images of {adds / 1e9:.3g} G multiply-adds per epoch"
    else:
        cost, reason = 1.0, "as requested"
    try:
        epochs = budget.epochs(cost)
    except ValueError as error:
        raise ValueError(f"{error} ({experiment.name}: {reason})") from None
    return PlannedRun(key, epochs, timed.dtype, timed.memory_format, reason)


def _multiply_adds(experiment: Experiment) -> int:
    """Return the multiply-adds of the forward pass of one image, in training form."""
    classes = load_split(experiment.data, experiment.data.train_split).classes
    network = build_unloaded(experiment.model, classes).eval()
    return count(network, random_images(1, largest_input(experiment.data))).multiply_adds


def _as_planned(experiment: Experiment, run: PlannedRun) -> Experiment:
    # Only the last epoch is evaluated: nothing is selected on the test split.
    changes: dict[str, Any] = {"dtype": run.dtype, "memory_format": run.memory_format}
    changes |= {"epochs": run.epochs, "eval_every": run.epochs}
    return replace(experiment, train=replace(experiment.train, **changes))


def _earlier_plans() -> dict[str, PlannedRun]:
    found: dict[str, PlannedRun] = {}
    for path in sorted(COMPARISONS.glob(f"*/{_FILE}")):
        try:
            runs = read_json(path)["schedules"].values()
            found |= {values["key"]: PlannedRun(**values) for values in runs}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # Written by another version.
    return found


def _key(experiment: Experiment, code: str, budget: Budget, where: str = "") -> str:
    unnamed = replace(experiment, name="", train=replace(experiment.train, seed=0, epochs=1))
    return _hash(
        [experiment_to_dict(unnamed), budget.unit, budget.amount, where, *([code] if code else [])]
    )


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
