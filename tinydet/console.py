"""Log lines on standard output, for commands and for programs that set up no logging."""

from __future__ import annotations

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


def log_level() -> int:
    """Return the level of what is shown: of the processes of a distributed run, one prints."""
    return logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR


def show_log() -> None:
    """Print what TinyDet logs, unless the program has set up logging, which then decides."""
    logger = logging.getLogger("tinydet")
    if not logger.hasHandlers():
        logger.addHandler(StdoutHandler())
        logger.setLevel(log_level())
