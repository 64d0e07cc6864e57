"""What the system counts of a process that makes and frees large tensors."""

import os
import subprocess
import sys

import pytest

PAGES = """
import argparse, resource, sys
import torch
from tinydet.cli import run
from tinydet.memory import keep_freed_memory, return_freed_memory

def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

what = sys.argv.pop()
if what == "keep":
    keep_freed_memory()
elif what == "tool":
    run(lambda args: None, argparse.ArgumentParser())
for i in range(15):
    if i == 5:  # it has settled
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(40 * 2**20, dtype=torch.uint8) for _ in range(3)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, size(), end=" ")
return_freed_memory()
print(size())
"""


def pages(what, **variables):
    """Return how many were cleared, and how many the process had then and after giving back."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", PAGES, what]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    )
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to")
def test_the_next_tensors_take_what_the_last_ones_left_until_it_is_given_back():
    # 30,000 of 4 kB; other processors have pages of 16 or 64.
    once = 120 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    cleared, _, _ = pages("leave")
    assert cleared > 0.9 * 10 * once
    cleared, kept, after = pages("keep")
    assert cleared < 0.2 * once
    assert kept - after > 0.9 * once
    cleared, _, _ = pages("tool")
    assert cleared < 0.2 * once
    # Who has chosen by a variable of the C library's own is let be.
    cleared, _, _ = pages("keep", MALLOC_ARENA_MAX="2")
    assert cleared > 0.9 * 10 * once
