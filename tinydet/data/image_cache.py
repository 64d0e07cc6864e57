"""Decoded images in memory shared by all loader processes."""

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
    """Decoded images by number, filled by the process that decodes an image first.

    The memory is an anonymous file, made before the loader processes start and inherited by them;
    the system frees it with the last of them, even if that is killed. There are no locks: an image
    is marked as present after it is written, and processes that decode the same image at the same
    time write the same bytes.

    Attributes:
        count: number of images that fit, the first ones; others are decoded each time.
        nbytes: memory of these images, at most the budget.

    Args:
        sides: (I, 2) height and width of every decoded image.
        budget_mb: largest size of the memory in megabytes, 2**20 bytes.
    """

    def __init__(self, sides: np.ndarray, budget_mb: int) -> None:
        ends = np.cumsum(sides.astype(np.int64).prod(axis=1) * _CHANNELS)
        # One byte per image says whether it is present.
        needed = ends + np.arange(1, len(sides) + 1)
        self.count = int(np.searchsorted(needed, budget_mb * _MEGABYTE, side="right"))
        self.nbytes = int(needed[self.count - 1]) if self.count else 0
        self._sides = sides[: self.count].astype(np.int32)
        self._starts = self.count + np.concatenate([[0], ends[: self.count]])
        self._file = _anonymous_file()
        self._file.truncate(max(1, self.nbytes))
        self._memory = self._map()

    def get(self, i: int) -> np.ndarray | None:
        """Return a copy of image `i`, (H, W, 3) uint8, or None if it is not present."""
        if i >= self.count or not self._memory[i]:
            return None
        return self._part(i).copy()

    def put(self, i: int, image: np.ndarray) -> None:
        """Keep image `i`, (H, W, 3) uint8, if there is room and its sides are as expected."""
        if i < self.count and image.shape == (*self._sides[i], _CHANNELS):
            self._part(i)[:] = image
            self._memory[i] = 1  # last: the pixels are complete

    def _part(self, i: int) -> np.ndarray:
        start, end = self._starts[i : i + 2]
        return self._memory[start:end].reshape(*self._sides[i], _CHANNELS)

    def _map(self) -> np.ndarray:
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0), dtype=np.uint8)

    # Spawned (not forked) processes receive the file.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_file": reduction.DupFd(self._file.fileno())}
        del state["_memory"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = os.fdopen(state["_file"].detach(), "r+b", buffering=0)
        self._memory = self._map()


def _anonymous_file() -> BinaryIO:
    """Open an anonymous file, which is deleted with the last process that has it open."""
    if hasattr(os, "memfd_create"):  # Linux: in memory, without the limit of /dev/shm
        return os.fdopen(os.memfd_create("tinydet-images"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
