"""What is compared, decided once: the epochs that a budget is for each experiment, and the dtype.

The plan is a file in the comparison's folder. Started again, a comparison takes it from there, so
that a clock that ticks otherwise today does not make other runs of it; another comparison takes
from it what it says of the same experiment.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinydet.comparison.budget import Budget
from tinydet.config import ConfigError, Experiment
from tinydet.data.dataset import load_split
from tinydet.deployment.flops import count
from tinydet.deployment.images import largest_input, random_images
from tinydet.experiment_file import experiment_to_dict, load_experiment
from tinydet.report.run_folder import read_json
from tinydet.training.checkpoint import build_unloaded
from tinydet.training.device import describe_device, pick_device
from tinydet.training.profile import time_steps
from tinydet.training.results import write_json
from tinydet.training.runs import RUNS

logger = logging.getLogger(__name__)

COMPARISONS = RUNS / "compare"
_FILE = "plan.json"
_SAME_DATA = ("root", "source", "train_split", "test_split", "classes")


@dataclass(frozen=True)
class Schedule:
    """What the budget is for one experiment.

    Attributes:
        key: of the experiment but for its name, of the budget and of the machine.
        epochs: to be trained.
        dtype: "auto" resolved.
        memory_format: "auto" resolved.
        reason: how the epochs were found.
    """

    key: str
    epochs: int
    dtype: str
    memory_format: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A comparison about to begin, or to go on.

    Attributes:
        folder: the comparison's.
        budget: of a run.
        files: of the experiments, the base first.
        experiments: to be trained, but for the seed.
        reasons: of each experiment's epochs.
    """

    folder: Path
    budget: Budget
    files: tuple[Path, ...]
    experiments: tuple[Experiment, ...]
    reasons: tuple[str, ...]


def load_experiments(files: Sequence[Path], overrides: Sequence[str]) -> list[Experiment]:
    """Read experiments that can be compared.

    Args:
        files: the base, then the ideas.
        overrides: "a.b=value" for every one.

    Raises:
        ConfigError: a file is wrong or given twice, or two experiments differ in their data.
    """
    if len(files) < 2:
        raise ConfigError("give the base and at least one idea: BASE.py IDEA.py")
    experiments = [load_experiment(file, overrides) for file in files]
    base = experiments[0]
    for i, (file, experiment) in enumerate(zip(files, experiments, strict=True)):
        for other_file, other in zip(files[:i], experiments[:i], strict=True):
            if file.resolve() == other_file.resolve():
                raise ConfigError(f"{file}: given twice; a copy of it under another name will do")
            if experiment.name == other.name:
                raise ConfigError(
                    f"{file}: named {other.name!r} like {other_file}, and runs are kept by name; "
                    "rename one"
                )
        for name in _SAME_DATA:
            own, of_base = getattr(experiment.data, name), getattr(base.data, name)
            if own != of_base:
                raise ConfigError(
                    f"{file}: data.{name} is {own!r}, that of the base {files[0]} is {of_base!r}; "
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
        files: of the experiments.
        experiments: of `load_experiments`.
        budget: of each run.
        folder: the comparison's; None is `runs/compare/<base>-<hash of what is compared>/`.

    Raises:
        ValueError: an experiment cannot be built or trained as asked, the budget is less than an
            epoch, or the folder is another comparison's.
    """
    where = describe_device(pick_device(experiments[0].train.device))
    keys = [_key(experiment, budget, where) for experiment in experiments]
    names = [experiment.name for experiment in experiments]
    mark = _hash([names, [_key(experiment, budget) for experiment in experiments]])
    folder = folder or COMPARISONS / f"{names[0]}-{mark}"
    known = read_json(folder / _FILE)
    if known is not None:
        if not isinstance(known, dict) or known.get("mark") != mark:
            raise ValueError(
                f"--out {folder}: holds another comparison, of other experiments or another "
                "budget; name another folder"
            )
        schedules = [Schedule(**of_one) for of_one in known["schedules"].values()]
    else:
        earlier = _earlier_schedules()
        for key, experiment in zip(keys, experiments, strict=True):
            if key not in earlier:
                earlier[key] = _schedule(key, experiment, budget)
        schedules = [earlier[key] for key in keys]
        content = {
            "mark": mark,
            "budget": budget.text,
            "made_on": where,
            "files": [str(file) for file in files],
            "schedules": {
                name: asdict(of_one) for name, of_one in zip(names, schedules, strict=True)
            },
        }
        write_json(folder / _FILE, content)
    planned = [_planned(e, s) for e, s in zip(experiments, schedules, strict=True)]
    reasons = tuple(schedule.reason for schedule in schedules)
    return Plan(folder, budget, tuple(files), tuple(planned), reasons)


def _schedule(key: str, experiment: Experiment, budget: Budget) -> Schedule:
    logger.info(f"{experiment.name}: some steps before all runs")
    timed = time_steps(experiment, 20 if budget.unit == "seconds" else 1)
    images = timed.steps_an_epoch * experiment.train.batch_size
    if budget.unit == "seconds":
        cost = timed.seconds * timed.steps_an_epoch
        reason = f"{timed.steps_an_epoch} steps of {timed.seconds:.3g} s an epoch"
    elif budget.unit == "multiply-adds":
        adds = _multiply_adds(experiment)
        cost = float(adds) * images
        reason = f"{images} images of {adds / 1e9:.3g} G multiply-adds an epoch"
    else:
        cost, reason = 1.0, "as asked"
    try:
        epochs = budget.epochs(cost)
    except ValueError as error:
        raise ValueError(f"{error} ({experiment.name}: {reason})") from None
    return Schedule(key, epochs, timed.dtype, timed.memory_format, reason)


def _multiply_adds(experiment: Experiment) -> int:
    """Return those of an image's forward pass, in training form."""
    classes = load_split(experiment.data, experiment.data.train_split).classes
    network = build_unloaded(experiment.model, classes).eval()
    return count(network, random_images(1, largest_input(experiment.data))).multiply_adds


def _planned(experiment: Experiment, schedule: Schedule) -> Experiment:
    # The last epoch alone is evaluated: nothing is chosen on the test split.
    train = replace(
        experiment.train,
        epochs=schedule.epochs,
        eval_every=schedule.epochs,
        dtype=schedule.dtype,
        memory_format=schedule.memory_format,
    )
    return replace(experiment, train=train)


def _earlier_schedules() -> dict[str, Schedule]:
    found: dict[str, Schedule] = {}
    for path in sorted(COMPARISONS.glob(f"*/{_FILE}")):
        try:
            schedules = read_json(path)["schedules"].values()
            found |= {of_one["key"]: Schedule(**of_one) for of_one in schedules}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # Of another version.
    return found


def _key(experiment: Experiment, budget: Budget, where: str = "") -> str:
    unnamed = replace(experiment, name="", train=replace(experiment.train, seed=0, epochs=1))
    return _hash([experiment_to_dict(unnamed), budget.unit, budget.amount, where])


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
