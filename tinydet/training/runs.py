"""A run's folder, `runs/<experiment>/<n>/`, and when its checkpoints are written."""

from __future__ import annotations

import contextlib
import glob
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from tinydet.atomic import warn_on_oserror
from tinydet.config import ConfigError
from tinydet.training.checkpoint import (
    CheckpointError,
    previous_of,
    read_checkpoint,
    save_checkpoint,
    save_last,
)
from tinydet.training.distributed import rank, world_size
from tinydet.training.results import write_experiment
from tinydet.training.state import TrainingState

logger = logging.getLogger(__name__)

RUNS = Path("runs")


def new_run_dir(name: str, root: Path = RUNS) -> Path:
    """Create and return the next free `root/<name>/<n>/`.

    Raises:
        ConfigError: the experiment has no name.
    """
    if not name:
        raise ConfigError("name: is empty; name the experiment, or the run's folder")
    parent = root / name
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:  # Another run was quicker.
            continue
        return parent / str(number)


class ClaimedError(CheckpointError):
    """Another process trains in a run's folder."""


@contextlib.contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in a run's folder, on this machine or on a shared disk.

    The claim ends with the process, however it ends. Where there are no file locks (Windows, some
    network disks) there is no claim.

    Raises:
        ClaimedError: another process trains there.
    """
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((run_dir / ".lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ClaimedError(
                    f"{run_dir}: another process is training there; wait for it, or stop it first"
                ) from error
            except OSError as error:
                logger.info("%s: cannot be locked (%s)", run_dir, error.strerror)
        yield


def newest_to_resume(name: str, root: Path = RUNS) -> Path:
    """Return the last.pt of the newest run of an experiment, for `checkpoint.read_last`.

    Raises:
        CheckpointError: no run of it can be resumed.
    """
    # A run killed between two renames has only last.previous.pt.
    return newest_checkpoint(root, "last*.pt", name).with_name("last.pt")


def newest_checkpoint(root: Path = RUNS, file_name: str = "best.pt", name: str = "*") -> Path:
    """Return the newest run's checkpoint.

    Args:
        root: the folder of runs.
        file_name: "best.pt" and "last.pt" are written by training, "deploy.pt" by folding.
        name: only runs of this experiment; "*" is any.

    Raises:
        CheckpointError: there is none.
    """
    folder = name if name == "*" else glob.escape(name)
    found = list(root.glob(f"{folder}/*/{file_name}"))
    if not found:
        makes = "deploy/reparam.py" if file_name == "deploy.pt" else "tools/train.py EXPERIMENT"
        raise CheckpointError(
            f"{root}/{name}/*/{file_name}: no run has one yet; make it with `python {makes}`, "
            "or name a checkpoint"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


class Saver:
    """Writes the checkpoints of one run, on rank 0.

    Args:
        run_dir: the run's folder, which exists.
        state: what is saved.
    """

    def __init__(self, run_dir: Path, state: TrainingState) -> None:
        self._run_dir = run_dir
        self._state = state
        self._last = run_dir / "last.pt"
        self._saved_at = time.monotonic()
        self._is_saved = True
        if rank() == 0:
            for left in run_dir.glob(".*.tmp.*"):  # half a file of a process that was killed
                left.unlink(missing_ok=True)

    @property
    def is_due(self) -> bool:
        """Whether `train.save_minutes` have passed since last.pt was written."""
        minutes = (time.monotonic() - self._saved_at) / 60
        due = minutes >= self._state.experiment.train.save_minutes
        return due and not self._state.bad_in_a_row

    def save_last(self) -> None:
        """Write last.pt.

        Raises:
            OSError: it cannot be written; the previous one is still there.
        """
        if rank() > 0:
            return
        self._saved_at = time.monotonic()  # Also after a failure, which must not repeat every step.
        self._is_saved = False
        self._make_dir()
        try:
            save_last(self._last, self._state.checkpoint())
        except OSError as error:
            error.filename = error.filename or str(self._last)  # A failed write names no file.
            raise
        self._is_saved = True

    def try_save_last(self, ends: bool = False) -> None:
        """Write last.pt, or warn; not after skipped steps, which the weights may have caused.

        Args:
            ends: the run ends here: also after skipped steps.
        """
        if self._state.bad_in_a_row and not ends:
            self._is_saved = False
            logger.warning("%s: not written after a step with a non-finite loss", self._last)
            return
        with warn_on_oserror(self._last):
            self.save_last()

    def finish(self) -> None:
        """Write last.pt if the last attempt failed, or was left out after a skipped step.

        Raises:
            OSError: it still cannot be written.
        """
        if not self._is_saved:
            self.save_last()

    def best_ap50(self) -> float:
        """Return the AP50 of the folder's best.pt, -1 if there is none or it cannot be read."""
        path = self._run_dir / "best.pt"
        if not path.is_file():
            return -1.0
        try:
            return float(read_checkpoint(path)["best_ap50"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s: taken for no best checkpoint (%s)", path, error)
            return -1.0

    def save_best(self) -> bool:
        """Write best.pt, or warn; return whether it was written."""
        if rank() > 0:
            return True
        path = self._run_dir / "best.pt"
        with warn_on_oserror(path):
            self._make_dir()
            save_checkpoint(path, self._state.checkpoint())
            return True
        return False

    def save_epoch(self) -> None:
        """Write `epoch_<number>.pt` after every `train.keep_every`-th epoch, or warn."""
        every, epoch = self._state.experiment.train.keep_every, self._state.epoch
        if rank() == 0 and every and epoch % every == 0:
            path = self._run_dir / f"epoch_{epoch:04d}.pt"
            with warn_on_oserror(path):
                save_checkpoint(path, self._state.checkpoint())

    def _make_dir(self) -> None:
        if not self._run_dir.is_dir():
            logger.warning("%s: the run's folder was deleted; created again", self._run_dir)
            write_experiment(self._run_dir, self._state.experiment)

    def resume_command(self, arguments: Sequence[str] | None = None) -> str:
        """Return one line with the command that resumes this run, or why there is none.

        Args:
            arguments: of `tools/train.py` that give the experiment, its file first: one that
                registers a backbone of its own cannot be run from experiment.json, the default.
        """
        if not (self._last.is_file() or previous_of(self._last).is_file()):
            return f"{self._last} does not exist, so this run cannot be resumed"
        experiment, *options = arguments or [str(self._run_dir / "experiment.json")]
        options += ["--resume-from", str(self._last)]
        words = ["python", "tools/train.py", experiment, *options]
        if world_size() > 1:
            words = ["bash", "tools/dist_train.sh", experiment, str(world_size()), *options]
        return f"resume with: {shlex.join(words)}"
