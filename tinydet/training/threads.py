"""The number of torch's threads on a CPU that other programs use at the same time."""

from __future__ import annotations

import logging
import os
import time

import torch

from tinydet.training.distributed import world_size

logger = logging.getLogger(__name__)

_INTERVAL = 30.0  # seconds between checks
_WINDOW = 0.03  # seconds of a measurement, several time slices of the system's scheduler
_CHUNK = 8 * 32768  # numbers for each thread; torch gives a thread at least 32768


class Threads:
    """Uses as many threads as compute fastest; call `adapt` between steps.

    Each layer ends when its slowest thread does. A thread that shares its core with another program
    makes all others wait, so that two threads on two cores beside one busy program are several
    times slower than one.

    Nothing is changed on a GPU, with several processes, or if the user has set OMP_NUM_THREADS.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._most = torch.get_num_threads()
        self._is_fixed = (
            device.type != "cpu" or world_size() > 1 or bool(os.environ.get("OMP_NUM_THREADS"))
        )
        self._due = 0.0

    def adapt(self) -> None:
        """Measure and set the number of threads, if the last time was half a minute ago."""
        if self._is_fixed or self._most == 1 or time.monotonic() < self._due:
            return
        before = torch.get_num_threads()
        best = fastest_threads(self._most)
        torch.set_num_threads(best)
        if best < before:
            logger.info(
                f"{best} thread{'s'[: best > 1]} instead of {before}: other programs are using the "
                "cores; OMP_NUM_THREADS=N would keep it at N"
            )
        elif best > before:
            logger.info(f"{best} threads again")
        self._due = time.monotonic() + _INTERVAL


def fastest_threads(most: int) -> int:
    """Return the number of threads, at most `most`, that compute most per second at the moment.

    Takes about 0.1 s for each candidate: `most`, one less, and halves of it down to 1.
    """
    counts = sorted({most, most - 1, *(most >> i for i in range(1, most.bit_length()))} - {0})
    speeds = {count: _speed(count) for count in counts}
    # Within the noise, more threads: on an idle machine the number must not vary.
    return max(n for n in counts if speeds[n] > 0.9 * max(speeds.values()))


def _speed(threads: int) -> float:
    """Return chunks computed per second: the best of three short measurements."""
    torch.set_num_threads(threads)
    values = torch.zeros(threads * _CHUNK)
    values.sigmoid_()  # starts the threads
    speeds = []
    for _ in range(3):
        done, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < _WINDOW:
            values.sigmoid_()
            done += threads
        speeds.append(done / seconds)
    return max(speeds)
