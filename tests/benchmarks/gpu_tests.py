"""The tests that need a GPU, as a part of the GPU benchmark."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch
from gpu_process import Row
from gpu_sizes import Sizes

_TESTS = Path(__file__).resolve().parents[1]


def run_tests(device: torch.device, sizes: Sizes, folder: Path = _TESTS) -> Iterator[Row]:
    """Run the tests marked "gpu" of a folder; yield a row for each.

    Raises:
        RuntimeError: some failed, or none was found.
    """
    del device, sizes
    files = [p for p in sorted(folder.rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    if not files:
        raise RuntimeError(f"{folder}: no file has a test marked gpu")
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "tests.xml"
        options = [
            "-vv",
            "-m",
            "gpu",
            "-n",
            "0",
            "--timeout",
            "60",
            "--continue-on-collection-errors",
        ]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *files]
        status = subprocess.run([*map(str, command)], cwd=_TESTS.parent).returncode
        if not report.is_file():
            raise RuntimeError(f"pytest ended with exit status {status} and wrote no report")
        cases = [*ElementTree.parse(report).iter("testcase")]
    rows = [_row(case) for case in cases]
    yield from rows
    bad = sum(row["outcome"] in ("failure", "error") for row in rows)
    if bad:
        raise RuntimeError(f"{bad} of {len(rows)} tests failed")


def _row(case: ElementTree.Element) -> Row:
    problem = next(iter(case), None)
    known = problem is not None and problem.tag in ("failure", "error", "skipped")
    return {
        "test": case.get("name"),
        "outcome": problem.tag if known and problem is not None else "passed",
        "seconds": float(case.get("time", 0)),
        "first line": (problem.get("message", "") if known else "").partition("\n")[0][:200],
    }
