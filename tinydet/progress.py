"""How far a long task is: a live bar in a terminal, elsewhere a log line now and then."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import rich
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)

_REFRESH = 0.1  # seconds between two drawings of a bar


class Progress:
    """Shows how far a task is; use as a context manager.

    In a terminal or a notebook it is a bar that vanishes at the end, with those of tasks within the
    task below. Elsewhere a line is logged whenever `interval` seconds have passed.

    Args:
        what: the task; `what` and `status`, shown after the units done, may be set at any time.
        total: units in all, 0 if unknown.
        unit: their name in the plural.
        done: units done before, which do not count in the estimate of the time left.
        left: words that follow the estimated time.
        interval: seconds between two lines.
        clock: returns seconds.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        left: str = "left",
        interval: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.status = what, ""
        self._total, self._unit, self._left = total, unit, left
        self._done = self._done_before = self._done_said = done
        self._interval, self._clock = interval, clock
        console = rich.get_console()
        # Some environment variables make rich take a pipe for a terminal.
        is_terminal = console.is_terminal and console.file.isatty() and not console.is_dumb_terminal
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[text]}", markup=False),
            # A thread that draws might hold a lock while loader processes are forked.
            auto_refresh=False,
            transient=True,
            disable=os.environ.get("RANK", "0") != "0" or not (is_terminal or console.is_jupyter),
        )
        self._task = self._bar.add_task("", total=total or None, text="")

    def __enter__(self) -> Progress:
        self._begin = self._last = self._said = self._clock()
        self._bar.start()
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def is_due(self) -> bool:
        """Whether the next `advance` shows a new status."""
        return self._clock() - self._said >= self._interval

    def advance(self, units: int = 1) -> None:
        """Count units that have just been done."""
        self._done += units
        self._last = self._clock()
        if self._last - self._drawn >= _REFRESH:
            self._draw()
        if self.is_due:
            self.say()

    def pause(self) -> None:
        """Leave the time since the last `advance` out of the estimate."""
        pause = self._clock() - self._last
        self._begin, self._said, self._last = (
            second + pause for second in (self._begin, self._said, self._last)
        )

    def say(self) -> None:
        """Log a line now, unless there is a bar, or a line for these units already."""
        self._said = self._clock()
        if self._bar.disable and self._done != self._done_said:
            self._done_said = self._done
            logger.info("%s: %s", self.what, self._text())

    def _draw(self) -> None:
        self._drawn, text = self._last, self._text()
        self._bar.update(self._task, completed=self._done, description=self.what, text=text)
        self._bar.refresh()

    def _text(self) -> str:
        parts = [f"{self._done}{f'/{self._total}' * bool(self._total)} {self._unit}", self.status]
        done, to_do = self._done - self._done_before, self._total - self._done
        if done and to_do > 0:
            seconds = (self._last - self._begin) / done * to_do
            parts.append(f"{_in_words(seconds)} {self._left}")
        return ", ".join(filter(None, parts))


def _in_words(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
