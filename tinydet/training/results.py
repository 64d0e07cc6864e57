"""A run's results: `metrics.json`, `report.json` and the `report.html` made of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinydet.atomic import write_text
from tinydet.config import Experiment
from tinydet.data.dataset import load_split
from tinydet.data.index import Index
from tinydet.evaluation import Metrics
from tinydet.evaluation.tide import tide
from tinydet.evaluation.tide_table import tide_as_dict
from tinydet.evaluation.voc import interpolated_precision
from tinydet.experiment_file import experiment_to_dict, load_experiment
from tinydet.report.page import write_page
from tinydet.report.run_folder import read_json
from tinydet.training.checkpoint import load_checkpoint
from tinydet.training.device import pick_device
from tinydet.training.evaluate import evaluate_detector, ground_truth
from tinydet.training.pictures import ranked_images
from tinydet.training.session import this_session
from tinydet.training.state import TrainingState

logger = logging.getLogger(__name__)


def write_experiment(
    run_dir: Path, experiment: Experiment, changed: Sequence[str] = (), code: str = ""
) -> None:
    """Write `experiment.json`, which can be run again, and add this process to `sessions.json`.

    Args:
        run_dir: the run's folder, created if missing.
        experiment: the resolved experiment.
        changed: settings that differ from before the run was resumed.
        code: hash of the experiment's code; "" if it has none.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "experiment.json", experiment_to_dict(experiment))
    path = run_dir / "sessions.json"
    session = this_session(pick_device(experiment.train.device))
    if changed:
        session["changed"] = ", ".join(changed)
    if code:
        session["code"] = code
    write_json(path, [*(read_json(path) or []), session])


def write_results(
    run_dir: Path,
    state: TrainingState,
    metrics: Metrics,
    is_best: bool,
    train_index: Index,
    test_index: Index,
) -> None:
    """Write `metrics.json` and `report.html`.

    `AP50` and the other metrics are those of best.pt, saved after `best_epoch`; `last_AP50` is that
    of last.pt.
    """
    path = run_dir / "metrics.json"
    best = {**metrics.as_dict(), "best_epoch": state.epoch}
    if not is_best:
        try:
            best = dict(read_json(path) or best)
        except (ValueError, TypeError) as error:
            logger.warning("%s: the figures of best.pt are lost, these are of last.pt", error)
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
    try:
        if is_best:
            notes = [f"{state.precision.dtype}: {state.precision.reason}", *state.schedule.lines]
            write_details(run_dir, metrics, train_index, test_index, notes)
        write_page(run_dir)
    except (OSError, ValueError) as error:  # A missing page must not end the run.
        logger.warning("report.html cannot be written: %s", error)


def write_details(
    run_dir: Path, metrics: Metrics, train_index: Index, test_index: Index, notes: Sequence[str]
) -> None:
    """Write `report.json`: what the page shows beside `metrics.json`.

    Args:
        run_dir: the run's folder.
        metrics: of the test split.
        train_index: the training split.
        test_index: the test split.
        notes: choices that the run made, one sentence each.
    """
    voc = metrics.voc
    errors = tide(metrics.detections, ground_truth(test_index), len(metrics.classes))
    details = {
        "notes": list(notes),
        "data": [
            {"split": f"{i.split}, {len(i)} images", "problems": i.problems.summary()}
            for i in (train_index, test_index)
        ],
        "curves": {
            name: interpolated_precision(right, int(boxes)).round(4).tolist()
            for name, right, boxes in zip(
                metrics.classes, voc.true_positives, voc.num_boxes, strict=True
            )
            if boxes
        },
        "lost": tide_as_dict(errors, metrics.classes),
        **ranked_images(metrics, test_index),
    }
    write_json(run_dir / "report.json", details)


def evaluate_again(run_dir: Path, device: str) -> None:
    """Evaluate a run's best.pt on its test split and rewrite `report.json`.

    Raises:
        ValueError: a file of the run cannot be used, or the data set is missing.
    """
    experiment = load_experiment(run_dir / "experiment.json")
    where = pick_device(device)
    detector = load_checkpoint(run_dir / "best.pt", experiment, where).detector
    data = replace(experiment.data, classes=detector.classes)
    train_index, test_index = load_split(data, data.train_split), load_split(data, data.test_split)
    size = experiment.train.eval_batch_size
    metrics = evaluate_detector(detector, test_index, data, size, where)
    details = read_json(run_dir / "report.json")
    notes = details.get("notes", []) if isinstance(details, dict) else []
    write_details(run_dir, metrics, train_index, test_index, notes)


def write_json(path: Path, content: Any) -> None:
    """Write JSON without NaN, which is not valid JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
