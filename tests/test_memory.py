"""What the system counts of a process that makes and frees large tensors."""

import os
import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import torch
from tinydet.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for i in range(15):
    if i == 5:  # it has settled
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(40 * 2**20, dtype=torch.uint8) for _ in range(3)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_cleared(what, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", PAGES, what]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to")
def test_keep_freed_memory__the_next_tensors_take_what_the_last_ones_left():
    # Ten times 120 MB are 300,000 pages of 4 kB, or of 16 or 64 on other processors.
    pages = 10 * 120 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert pages_cleared("leave") > 0.9 * pages
    assert pages_cleared("keep") < 0.02 * pages
    # Who has chosen by a variable of the C library's own is let be.
    assert pages_cleared("keep", MALLOC_ARENA_MAX="2") > 0.9 * pages
