"""When a run's checkpoints are written, and what happens where one cannot be."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinydet.training.checkpoint import previous_of, save_checkpoint, save_last
from tinydet.training.distributed import rank, world_size
from tinydet.training.results import write_experiment
from tinydet.training.state import TrainingState

logger = logging.getLogger(__name__)


@contextmanager
def going_on(path: Path) -> Iterator[None]:
    """Turn a failure to write a file into a warning: weights in memory are worth more than a file.

    A full disk can be cleared while training goes on; the file is as it was before.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        logger.warning("%s: cannot be written (%s); training goes on without", path, reason)


class Saver:
    """Writes the checkpoints of one run; of several processes, the first does.

    Args:
        run_dir: the run's folder, there already.
        state: what is saved.
    """

    def __init__(self, run_dir: Path, state: TrainingState) -> None:
        self._run_dir = run_dir
        self._state = state
        self._last = run_dir / "last.pt"
        self._written = time.monotonic()
        self._is_written = True
        if rank() == 0:
            for left in run_dir.glob(".*.tmp.*"):  # Half a file of a process that was killed.
                left.unlink(missing_ok=True)

    @property
    def is_due(self) -> bool:
        """Whether `train.save_minutes` have passed since last.pt was written, and it would be."""
        passed = time.monotonic() - self._written
        minutes = self._state.experiment.train.save_minutes
        return passed >= 60 * minutes and not self._state.bad_in_a_row

    def save_last(self) -> None:
        """Write last.pt.

        Raises:
            OSError: it cannot be written; the one before is still there.
        """
        if rank() > 0:
            return
        self._written = time.monotonic()  # Also after a failure, which is not to come every step.
        self._is_written = False
        self._renew_folder()
        try:
            save_last(self._last, self._state.checkpoint())
        except OSError as error:
            error.filename = error.filename or str(self._last)  # A failed write names no file.
            raise
        self._is_written = True

    def try_last(self) -> None:
        """Write last.pt, or warn; not after bad steps: the weights may be what made them bad."""
        if self._state.bad_in_a_row:
            logger.warning("%s: left as it is after a step that was no number", self._last)
            return
        with going_on(self._last):
            self.save_last()

    def finish(self) -> None:
        """Write the run's last last.pt once more, if it could not be written.

        Raises:
            OSError: it still cannot.
        """
        if not self._is_written:
            self.save_last()

    def save_best(self) -> bool:
        """Write best.pt, or warn; returns whether it was written."""
        if rank() > 0:
            return True
        path = self._run_dir / "best.pt"
        with going_on(path):
            self._renew_folder()
            save_checkpoint(path, self._state.checkpoint())
            return True
        return False

    def keep_epoch(self) -> None:
        """Write `epoch_<number>.pt` after every `train.keep_every`-th epoch, or warn."""
        every, epoch = self._state.experiment.train.keep_every, self._state.epoch
        if rank() == 0 and every and epoch % every == 0:
            path = self._run_dir / f"epoch_{epoch:04d}.pt"
            with going_on(path):
                save_checkpoint(path, self._state.checkpoint())

    def _renew_folder(self) -> None:
        if not self._run_dir.is_dir():
            logger.warning("%s: the run's folder is gone; it is made anew", self._run_dir)
            write_experiment(self._run_dir, self._state.experiment)

    def how_to_go_on(self) -> str:
        """Return the command that resumes this run, or why there is none."""
        if not (self._last.is_file() or previous_of(self._last).is_file()):
            return f"{self._last}: there is none, so this run cannot be resumed"
        experiment, resume = (
            str(self._run_dir / "experiment.json"),
            ["--resume-from", str(self._last)],
        )
        if world_size() > 1:
            words = ["bash", "tools/dist_train.sh", experiment, str(world_size()), *resume]
        else:
            words = ["python", "tools/train.py", experiment, *resume]
        return f"go on with: {shlex.join(words)}"
