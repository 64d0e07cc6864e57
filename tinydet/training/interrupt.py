"""Ctrl-C and SIGTERM: a run ends between two steps, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tinydet.training.distributed import rank

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end.

    Attributes:
        exit_status: what a shell expects of a process ended by that signal: 130 or 143.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Interrupts:
    """Turns SIGINT and SIGTERM into `Interrupted`, at a moment that suits.

    Attributes:
        received: the number of the signal held back, if there is one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._holding = False

    @contextmanager
    def caught(self) -> Iterator[Interrupts]:
        """Take the place of the process's handlers; a signal raises `Interrupted`."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python lets no other thread handle signals.
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Only note a first signal, for `raise_received`; a second one raises at once."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        self.raise_received()

    def raise_received(self) -> None:
        """Raise `Interrupted` if a signal was held back."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._holding or self.received is not None:
            raise Interrupted(number)
        self.received = number
        # Not print: the signal may have come in the middle of another print.
        if rank() == 0:
            os.write(2, b"\nfinishing this step, then saving; a second signal stops at once\n")
