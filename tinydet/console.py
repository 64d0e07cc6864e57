"""Log lines on standard output, for commands and for programs that set up no logging."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TextIO


class StdoutHandler(logging.StreamHandler):
    """Write to the current `sys.stdout`, which a progress bar on screen replaces."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """The stream to write to."""
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        """Discard further output if the reader of a pipe has closed it; the command continues."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            discard_output()
        else:
            super().handleError(record)


def discard_output() -> None:
    """Let what is printed from now on go nowhere: as Python ends it would fail once more."""
    with contextlib.suppress(OSError, ValueError):  # a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_level() -> int:
    """Return the level of what is shown: of the processes of a distributed run, one prints."""
    return logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR


def show_log() -> None:
    """Print what TinyDet logs, unless the program has set up logging, which then decides."""
    logger = logging.getLogger("tinydet")
    if not logger.hasHandlers():
        logger.addHandler(StdoutHandler())
        logger.setLevel(log_level())
