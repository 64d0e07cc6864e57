"""How far a long task is: a live bar in a terminal, elsewhere a log line now and then."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)

_REFRESH = 0.1  # seconds between two drawings of a bar


class Progress:
    """Shows how far a task is; use as a context manager.

    In a terminal or a notebook it is a bar that vanishes at the end; those of tasks within the task
    are below it. Elsewhere a line is logged whenever `interval` seconds have passed, so a shorter
    task logs none. Of several processes only the first one shows anything.

    Attributes:
        what: the task, as the user reads it.
        status: shown after the number of units done.

    Args:
        what: initial value of the attribute.
        total: units in all, 0 if unknown.
        unit: their name in the plural.
        done: units done before, which do not count in the estimate of the time left.
        left: what is left, said after its estimated time.
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
        self._done = self._done_before = done
        self._interval, self._clock = interval, clock
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._begin = self._last = self._said = self._drawn = self._clock()
        self._is_first = os.environ.get("RANK", "0") == "0"
        self._bar = _bar() if self._is_first else None
        if self._bar is not None:
            total = self._total or None
            self._task = self._bar.add_task(self.what, total=total, text=self._text())
            self._bar.start()
            self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def is_due(self) -> bool:
        """Whether the next `advance` shows a new status."""
        return self._clock() - self._said >= self._interval

    def advance(self, units: int = 1) -> None:
        """Count units that have just been done."""
        self._done += units
        self._last = self._clock()
        if self._bar is not None and self._last - self._drawn >= _REFRESH:
            self._draw()
        if self.is_due:
            self.say()

    def skip(self, units: int = 0) -> None:
        """Count units that took no time, and as none the time since the last `advance`."""
        self._done += units
        self._done_before += units
        pause = self._clock() - self._last
        self._begin += pause
        self._said += pause
        self._last += pause

    def say(self) -> None:
        """Log a line now, unless there is a bar."""
        self._said = self._clock()
        if self._is_first and self._bar is None:
            logger.info("%s: %s", self.what, self._text())

    def _draw(self) -> None:
        assert self._bar is not None
        self._drawn = self._last
        self._bar.update(
            self._task, completed=self._done, description=self.what, text=self._text(), refresh=True
        )

    def _text(self) -> str:
        parts = [f"{self._done}{f'/{self._total}' if self._total else ''} {self._unit}"]
        if self.status:
            parts.append(self.status)
        done, to_do = self._done - self._done_before, self._total - self._done
        if done and to_do > 0:
            parts.append(f"{_in_words((self._last - self._begin) / done * to_do)} {self._left}")
        return ", ".join(parts)


def _in_words(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def _bar() -> Bar | None:
    """Return a live display for standard output, None if it is a file or a pipe.

    It shares the console with displays that are live already. It is drawn by the calling thread: a
    thread of its own might hold a lock while loader processes are forked.
    """
    import rich
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = rich.get_console()
    # Some variables of the environment make rich take a pipe for a terminal.
    is_terminal = console.is_terminal and console.file.isatty() and not console.is_dumb_terminal
    if not is_terminal and not console.is_jupyter:
        return None
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[text]}", markup=False),
        auto_refresh=False,
        transient=True,
    )
