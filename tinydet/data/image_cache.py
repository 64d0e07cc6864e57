"""Decoded images in memory that all loader processes share."""

from __future__ import annotations

import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import Any, BinaryIO

import numpy as np

_MEGABYTE = 2**20
_CHANNELS = 3


class ImageCache:
    """Decoded images by their number, filled by whichever process decodes one first.

    The memory is a file without a name, made before the loader processes start and inherited by
    them: nothing is left of it when the last of them ends, however it ends. Nobody waits for
    anybody: an image is marked as there once all of it is written, and processes that decode the
    same one at the same time write the same bytes.

    Attributes:
        count: images that fit, the first ones; the others are decoded each time.
        nbytes: memory in use once all of these are there, at most the budget.

    Args:
        sides: (I, 2) height and width of every image as it will be put in.
        budget_mb: largest size of the memory in megabytes, 2**20 bytes.
    """

    def __init__(self, sides: np.ndarray, budget_mb: int) -> None:
        ends = np.cumsum(sides.astype(np.int64).prod(axis=1) * _CHANNELS)
        # One byte of each image says whether it is there.
        needed = ends + np.arange(1, len(sides) + 1)
        self.count = int(np.searchsorted(needed, budget_mb * _MEGABYTE, side="right"))
        self.nbytes = int(needed[self.count - 1]) if self.count else 0
        self._sides = sides[: self.count].astype(np.int32)
        self._starts = self.count + np.concatenate([[0], ends[: self.count]])
        self._file = _nameless_file()
        self._file.truncate(max(1, self.nbytes))
        self._memory = self._map()

    def get(self, i: int) -> np.ndarray | None:
        """Return a copy of image `i`, (H, W, 3) uint8, or None if it is not there."""
        if i >= self.count or not self._memory[i]:
            return None
        return self._part(i).copy()

    def put(self, i: int, image: np.ndarray) -> None:
        """Keep image `i`, (H, W, 3) uint8; one that has no place or other sides is not kept."""
        if i < self.count and image.shape == (*self._sides[i], _CHANNELS):
            self._part(i)[:] = image
            self._memory[i] = 1  # last of all: it tells the others that the pixels are there

    def _part(self, i: int) -> np.ndarray:
        start, end = self._starts[i : i + 2]
        return self._memory[start:end].reshape(*self._sides[i], _CHANNELS)

    def _map(self) -> np.ndarray:
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0), dtype=np.uint8)

    # Processes that are spawned, not forked, are handed the file.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_file": reduction.DupFd(self._file.fileno())}
        del state["_memory"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = os.fdopen(state["_file"].detach(), "r+b", buffering=0)
        self._memory = self._map()


def _nameless_file() -> BinaryIO:
    """Open a file that no folder lists and that goes with the last process that has it open."""
    if hasattr(os, "memfd_create"):  # Linux: it lives in memory, and not in a small /dev/shm
        return os.fdopen(os.memfd_create("tinydet-images"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
