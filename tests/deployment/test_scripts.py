"""The command lines of deployment: errors in one line, from best.pt to ONNX."""

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


def _run(script, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(_ROOT / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )


def test_without_arguments_the_newest_run_is_taken(make_checkpoint, make_detector):
    source = make_checkpoint(make_detector())
    cwd = source.parents[3]
    folded = _run("deploy/reparam.py", cwd=cwd)
    assert folded.returncode == 0, folded.stderr
    assert source.with_name("deploy.pt").is_file()
    assert "norms" in folded.stdout
    assert "-> 0" in folded.stdout
    exported = _run("deploy/export_onnx.py", "--size", "64", "64", cwd=cwd)
    assert exported.returncode == 0, exported.stderr
    assert source.with_name("deploy.onnx").is_file()


@pytest.mark.parametrize("script", ["deploy/reparam.py", "deploy/export_onnx.py"])
def test_mistakes_are_one_line(script, tmp_path):
    done = _run(script, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: runs/")
