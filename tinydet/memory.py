"""The machine's memory, and the settings of the C library's allocator."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_GROWTH = 64 * 2**20


# What torch's allocators for the CPU and for Apple's GPUs say in a RuntimeError; CUDA's has a type.
_EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a GPU is full."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _EXHAUSTED)


def machine_memory() -> int:
    """Return the machine's memory in bytes; `sys.maxsize` if the system does not report it."""
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Keep freed memory in this process for reuse, if the C library is glibc.

    By default glibc returns large blocks to the system when they are freed, and the system clears
    each page of the next tensor again: 100,000 pages in a training step of EfficientNet-Lite0 with
    8 images of 256x320, a quarter of its time. In exchange the process does not shrink. Nothing is
    changed with other C libraries, or if the user tunes glibc with `MALLOC_*` variables.
    """
    glibc = _glibc()
    if glibc is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        glibc.mallopt(_MMAP_MAX, 0)  # use the heap, which is kept, instead of mappings
        glibc.mallopt(_TRIM_THRESHOLD, -1)  # never
        glibc.mallopt(_TOP_PAD, _GROWTH)


def return_freed_memory() -> None:
    """Return free memory to the system, if the C library is glibc.

    Call it before forking processes: shared pages, free or not, are copied as soon as this process
    writes to them.
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
