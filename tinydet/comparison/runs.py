"""The runs of a comparison: reused, resumed or trained.

They are ordinary runs in `runs/<experiment>/<n>/`, recognized by the resolved experiment and the
hash of its code in their folder, so that comparisons share the runs of their base.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tinydet.config import Experiment
from tinydet.data.index import Index
from tinydet.evaluation.saved_detections import SavedDetections, load_detections, save_detections
from tinydet.experiment_code import is_run_of
from tinydet.experiment_file import experiment_from_dict
from tinydet.report.run_folder import read_json
from tinydet.training.checkpoint import CheckpointError, load_checkpoint, previous_of
from tinydet.training.device import pick_device
from tinydet.training.evaluate import detect_split
from tinydet.training.loop import train
from tinydet.training.resume import without_side_settings
from tinydet.training.runs import RUNS, ClaimedError

logger = logging.getLogger(__name__)


def finished_run(experiment: Experiment, code: str = "") -> Path | None:
    """Return the folder of a finished run of exactly this experiment and seed, or None.

    Args:
        experiment: with its seed.
        code: `tinydet.experiment_code.experiment_code` of its file.
    """
    runs = (run for run in _runs_of(experiment) if is_run_of(run, code))
    return next((run for run in runs if _is_finished(run, experiment)), None)


def outdated_runs(experiment: Experiment, code: str) -> list[Path]:
    """Return the folders of runs whose fields are this experiment's, but not their code."""
    return [run for run in _runs_of(experiment) if not is_run_of(run, code)]


def train_run(experiment: Experiment, code: str = "") -> Path:
    """Train an experiment, or resume an interrupted run of it, and return the run's folder.

    Args:
        experiment: with its seed.
        code: `tinydet.experiment_code.experiment_code` of its file.

    Raises:
        ClaimedError: another process is training the run.
        Exception: whatever `tinydet.training.loop.train` raises.
    """
    started = [run for run in _runs_of(experiment) if is_run_of(run, code) and _can_resume(run)]
    if started:
        try:
            train(experiment, started[-1], started[-1] / "last.pt", code=code)
        except ClaimedError:
            raise
        except CheckpointError as error:
            logger.warning("%s; starting a new run", error)
            train(experiment, code=code)
    else:
        train(experiment, code=code)
    run = finished_run(experiment, code)
    if run is None:
        raise ValueError(
            f"{RUNS / experiment.name}: the run has finished but its metrics.json could not be "
            "written; free some disk space and rerun the command"
        )
    return run


def run_detections(run: Path, experiment: Experiment, index: Index) -> SavedDetections:
    """Return the detections of a run's last.pt on the test split.

    They are saved by the last evaluation of the training; for older runs they are computed here.

    Args:
        run: folder of the run.
        experiment: the experiment that was trained.
        index: the test split.

    Raises:
        ValueError: last.pt cannot be used.
    """
    path = run / "detections.npz"
    try:
        saved = load_detections(path)
    except ValueError:
        saved = None
    if saved and (saved.image_ids, saved.classes) == (tuple(index.image_ids), index.classes):
        return saved
    logger.info(f"{run}: running last.pt on {len(index)} images")
    device = pick_device(experiment.train.device)
    detector = load_checkpoint(run / "last.pt", experiment, device).detector
    batch_size = experiment.train.eval_batch_size
    found = detect_split(detector, index, experiment.data, batch_size, device)
    save_detections(path, index.image_ids, index.classes, found)
    return load_detections(path)


def training_speed(run: Path) -> float | None:
    """Return the training speed in images per second from a run's metrics.json."""
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
            continue  # Not a run, or written by another version.
        # If settings were changed on resuming, the run belongs to no single experiment.
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


def _can_resume(run: Path) -> bool:
    return any(path.is_file() for path in (run / "last.pt", previous_of(run / "last.pt")))
