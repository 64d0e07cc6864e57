"""The command lines: --help without torch, errors in one line, from best.pt to ONNX."""

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPTS = ["deploy/reparam.py", "deploy/export_onnx.py", "tools/speed.py"]


@pytest.mark.parametrize("script", _SCRIPTS)
def test_help_does_not_import_torch(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(_ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


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


@pytest.mark.parametrize("script", _SCRIPTS[:2])
def test_mistakes_are_one_line(script, tmp_path):
    done = _run(script, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: runs/")
