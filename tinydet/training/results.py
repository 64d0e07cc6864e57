"""What a run leaves for people and scripts: experiment.json, metrics.json, report.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinydet.atomic import write_text
from tinydet.config import Experiment
from tinydet.data.index import Index
from tinydet.evaluation import Metrics
from tinydet.experiment_file import experiment_to_dict
from tinydet.training.state import TrainingState


def write_experiment(run_dir: Path, experiment: Experiment) -> None:
    """Write the resolved experiment; `load_experiment` reads it, so it can be run again."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "experiment.json", experiment_to_dict(experiment))


def write_results(
    run_dir: Path,
    state: TrainingState,
    metrics: Metrics,
    is_best: bool,
    train_index: Index,
    test_index: Index,
) -> None:
    """Write `metrics.json`, the numbers of best.pt and of the run so far, and `report.md`.

    `AP50` and its kin belong to best.pt, saved after `best_epoch`; `last_AP50` to last.pt.
    """
    path = run_dir / "metrics.json"
    best = {**metrics.as_dict(), "best_epoch": state.epoch}
    if not is_best and path.is_file():
        best = json.loads(path.read_text())
    results = {
        **best,
        "last_AP50": metrics.as_dict()["AP50"],
        "epochs": state.epoch,
        "train_seconds": round(state.train_seconds, 1),
        "images_per_second": round(state.images_seen / state.train_seconds, 2),
        "dtype": state.precision.dtype,
        "memory_format": state.precision.memory_format,
        "data_problems": {
            index.split: index.problems.as_dict() for index in (train_index, test_index)
        },
    }
    write_json(path, results)
    if is_best:
        write_text(
            run_dir / "report.md",
            _report(state, metrics, [train_index, test_index]),
        )


def _report(state: TrainingState, metrics: Metrics, indexes: list[Index]) -> str:
    lines = [
        f"# {state.experiment.name}",
        "",
        f"best.pt, saved after epoch {state.epoch} and {state.train_seconds / 60:.1f} minutes of "
        "training:",
        "",
        "```",
        *metrics.lines(),
        "```",
        "",
        f"- {state.precision.dtype}, {state.precision.memory_format}: {state.precision.reason}",
        *(f"- {line}" for line in state.plan.lines),
        "",
        "## Problems found in the data",
        "",
    ]
    for index in indexes:
        found = index.problems.summary() or ["none"]
        lines += [f"{index.split} ({len(index)} images):", "", *(f"- {p}" for p in found), ""]
    return "\n".join(lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; NaN is refused, since many readers do."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
