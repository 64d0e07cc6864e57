"""Ctrl-C and SIGTERM: a run ends between two optimizer steps, with everything saved."""

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
        exit_status: what a shell expects of a process that was ended by that signal: 130 or 143.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Signals:
    """SIGINT and SIGTERM as `Interrupted` exceptions, raised at once or when it is safe.

    Attributes:
        received: number of the deferred signal, None if there is none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False

    @contextmanager
    def catch(self) -> Iterator[Signals]:
        """Install the handlers; inside, a signal raises `Interrupted`."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python handles signals in the main thread only.
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal is recorded and raised at the end; a second raises at once."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._deferring or self.received is not None:
            raise Interrupted(number)
        self.received = number
        # Not print: the signal may have come in the middle of another print.
        if rank() == 0:
            os.write(2, b"\nfinishing this step and saving; a second signal stops at once\n")
