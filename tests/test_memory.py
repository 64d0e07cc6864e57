"""Pages that the system clears for a process that allocates and frees large blocks."""

import os
import subprocess
import sys

import pytest

PAGES = """
import resource, sys
from tinydet.memory import keep_freed_memory, return_freed_memory

def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

what = sys.argv.pop()
if what == "keep":
    keep_freed_memory()
elif what == "tool":
    import argparse
    from tinydet.cli import run
    run(lambda args: None, argparse.ArgumentParser())
for i in range(6):
    if i == 2:  # it has settled
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytes([1]) * (40 * 2**20)  # written, so that its pages are needed
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, size(), end=" ")
return_freed_memory()
print(size())
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
# Pages of the block: 10,000 of 4 kB; other processors have pages of 16 or 64.
BLOCK = 40 * 2**20 // os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0


def pages(what, **variables):
    """Return the pages cleared, those of the process then, and those after giving memory back."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", PAGES, what]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    )
    return tuple(map(int, done.stdout.split()))


def test_freed_memory_is_reused_until_it_is_returned():
    cleared, _, _ = pages("leave")
    assert cleared > 0.9 * 4 * BLOCK
    cleared, kept, after = pages("keep")
    assert cleared < 0.2 * BLOCK
    assert kept - after > 0.9 * BLOCK


def test_users_settings_of_the_c_library_are_kept():
    cleared, _, _ = pages("keep", MALLOC_ARENA_MAX="2")
    assert cleared > 0.9 * 4 * BLOCK


@pytest.mark.slow  # imports torch
def test_tools_keep_freed_memory():
    cleared, _, _ = pages("tool")
    assert cleared < 0.2 * BLOCK
