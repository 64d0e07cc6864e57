"""The tools that show runs, as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_dir(tmp_path):
    """A run that died in the middle of a line."""
    (tmp_path / "experiment.json").write_text('{"name": "dead"}')
    (tmp_path / "metrics.json").write_text('{"train_seconds": 120, "AP50": 0.5}')
    lines = [
        {"mode": "train", "epoch": 1, "step": 10, "loss": 2.0, "images_per_second": 8.0},
        {"mode": "val", "epoch": 1, "step": 10, "AP50": 0.5, "AP": 0.25},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"mode": "tr')
    return tmp_path


def _run(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_summary_says_what_is_lost_and_what_is_known(run_dir):
    log = run_dir / "log.jsonl"
    warning, _, line = _run("tools/analyze_logs.py", "summary", log).splitlines()
    assert warning == f"{log}: skipped 1 unreadable line"
    assert line.split()[1:] == ["1", "1", "50.00", "25.00", "2", "8.0", "2.0"]
    _, _, of_folder = _run("tools/analyze_logs.py", "summary", run_dir).splitlines()
    assert of_folder.split()[1:] == line.split()[1:]


def test_plot_curve_draws_several_logs(run_dir):
    log, out = run_dir / "log.jsonl", run_dir / "curves.svg"
    options = [
        "--keys",
        "loss",
        "AP50",
        "--title",
        "Two",
        "--legend",
        "a",
        "b",
        "--style",
        "ggplot",
    ]
    options += ["--backend", "svg", "--out", out]
    said = _run("tools/analyze_logs.py", "plot_curve", log, log, *options)
    assert f"written to {out}" in said
    assert "<svg" in out.read_text()


def test_the_page_is_made_anew_from_the_folder(run_dir):
    said = _run("tools/report.py", run_dir)
    assert said == f"written to {run_dir / 'report.html'}\n"
    assert "50.0" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tools/report.py", "gone"], "gone: not a run's folder"),
        (["tools/errors.py", "gone.pt"], "gone.pt: no such checkpoint"),
        (["tools/errors.py", "a.pt", "b.pt", "c.pt"], "3 checkpoints: give one, or two"),
        (["tools/errors.py", "gone.py", "a.pt"], "gone.py: no such experiment file"),
        (["tools/analyze_logs.py", "summary", "gone.jsonl"], "gone.jsonl: No such file"),
        (["tools/analyze_logs.py", "summary", "tools"], "tools: a folder without log.jsonl; name"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    (line,) = _run(*arguments, status=2).splitlines()
    assert says in line
