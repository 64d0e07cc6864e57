"""The machine's memory, and how this process takes it from the system."""

from __future__ import annotations

import ctypes
import os
import sys

# Numbers of mallopt(3) in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_GROWTH = 64 * 2**20


def machine_memory() -> int:
    """Return the machine's memory in bytes; without limit where the system does not tell."""
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Let freed memory stay with this process, for its next tensors, where the C library can.

    By default glibc gives large blocks back as they are freed, and the system clears each page of
    the next tensor again: 100,000 pages a training step of EfficientNet-Lite0 with 8 images of
    256x320, a quarter of its time. In exchange the process stays as large as it has been at most.
    Other C libraries are left as they are, and so is one that the user tunes by variables.
    """
    glibc = _glibc()
    if glibc is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        glibc.mallopt(_MMAP_MAX, 0)  # from the heap, which stays, not from mappings, which do not
        glibc.mallopt(_TRIM_THRESHOLD, -1)  # never
        glibc.mallopt(_TOP_PAD, _GROWTH)


def return_freed_memory() -> None:
    """Give back what is free now, where the C library can.

    To do before processes are forked: pages that they share with this one, free or not, are copied
    as soon as it writes to them.
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
