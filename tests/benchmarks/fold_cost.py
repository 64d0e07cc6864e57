"""The CPU seconds and the memory that a call takes."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What a call took.

    Attributes:
        cpu_seconds: processor time of all threads.
        peak_mb: most memory in MB beyond what the process had before; None where the system does
            not tell.
    """

    cpu_seconds: float
    peak_mb: float | None


def measured(call: Callable[[], _Result]) -> tuple[_Result, Cost]:
    """Return what a call returns, and what it took."""
    gc.collect()
    before = _reset_peak()
    begin = time.process_time()
    result = call()
    seconds = time.process_time() - begin
    peak = None if before is None else round(max(0.0, _status_mb("VmHWM") - before), 1)
    return result, Cost(round(seconds, 2), peak)


def _reset_peak() -> float | None:
    """Let the peak of the process's memory start at what it has now, in MB; None if it cannot."""
    try:
        # Freed memory that the allocator keeps would hide what the call takes.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")
        return _status_mb("VmRSS")
    except (OSError, AttributeError):
        return None


def _status_mb(key: str) -> float:
    match = re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text())
    assert match is not None
    return int(match[1]) * 1024 / 1e6
