"""The runs of a comparison: found where they are, gone on with, or trained.

They are runs like all others, in `runs/<experiment>/<n>/`. Which of them are a comparison's is told
by what is in them, the resolved experiment, so that comparisons share the runs of their base.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tinydet.config import Experiment
from tinydet.data.index import Index
from tinydet.evaluation.saved_detections import SavedDetections, load_detections, save_detections
from tinydet.experiment_file import experiment_from_dict
from tinydet.report.run_files import read_json
from tinydet.training.checkpoint import CheckpointError, load_checkpoint, previous_of
from tinydet.training.device import pick_device
from tinydet.training.evaluate import detect_split
from tinydet.training.loop import train
from tinydet.training.resume import without_side_settings
from tinydet.training.runs import RUNS

logger = logging.getLogger(__name__)


def finished_run(experiment: Experiment) -> Path | None:
    """Return the folder of a finished run of this very experiment, seed and all, or None."""
    finished = [run for run in _runs_of(experiment) if _is_finished(run, experiment)]
    return finished[0] if finished else None


def train_run(experiment: Experiment) -> Path:
    """Train an experiment, going on with a run that was begun, and return the run's folder.

    Raises:
        Exception: whatever `tinydet.training.loop.train` raises.
    """
    begun = [run for run in _runs_of(experiment) if _can_go_on(run)]
    if begun:
        try:
            train(experiment, begun[-1], begun[-1] / "last.pt")
        except CheckpointError as error:
            logger.warning("%s: a new run is begun", error)
            train(experiment)
    else:
        train(experiment)
    run = finished_run(experiment)
    if run is None:
        raise ValueError(
            f"{RUNS / experiment.name}: the run has ended but its metrics.json could not be "
            "written; make room, and start again"
        )
    return run


def run_detections(run: Path, experiment: Experiment, index: Index) -> SavedDetections:
    """Return what the run's last weights find in the test split.

    The training's last evaluation has saved it; of an older run it is found anew, and saved.

    Args:
        run: its folder.
        experiment: that was trained.
        index: the test split.

    Raises:
        ValueError: the run's last.pt cannot be used.
    """
    path = run / "detections.npz"
    try:
        saved = load_detections(path)
    except ValueError:
        saved = None
    if saved and (saved.image_ids, saved.classes) == (tuple(index.image_ids), index.classes):
        return saved
    logger.info(f"{run}: detecting on {len(index)} images")
    device = pick_device(experiment.train.device)
    detector = load_checkpoint(run / "last.pt", experiment, device).detector
    batch_size = experiment.train.eval_batch_size
    found = detect_split(detector, index, experiment.data, batch_size, device)
    save_detections(path, index.image_ids, index.classes, found)
    return load_detections(path)


def training_speed(run: Path) -> float | None:
    """Return the images per second that a run was trained at, as its metrics.json states it."""
    value = (read_json(run / "metrics.json") or {}).get("images_per_second")
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _runs_of(experiment: Experiment) -> list[Path]:
    """Return the folders of an experiment's runs, the oldest first."""
    folder = RUNS / experiment.name
    numbers = sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit())
    found = []
    for number in numbers:
        run = folder / str(number)
        try:
            ran = experiment_from_dict(read_json(run / "experiment.json"))
            sessions = read_json(run / "sessions.json") or []
        except ValueError:
            continue  # Not a run, or one of another version.
        # A run whose settings changed on the way is of no one experiment.
        same = without_side_settings(ran) == without_side_settings(experiment)
        if same and not any("changed" in session for session in sessions):
            found.append(run)
    return found


def _is_finished(run: Path, experiment: Experiment) -> bool:
    try:
        metrics = read_json(run / "metrics.json")
    except ValueError:
        return False
    return isinstance(metrics, dict) and metrics.get("epochs") == experiment.train.epochs


def _can_go_on(run: Path) -> bool:
    return any(path.is_file() for path in (run / "last.pt", previous_of(run / "last.pt")))
