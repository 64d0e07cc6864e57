import csv
import dataclasses
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tinydet.reparam import zoo_run
from tinydet.reparam.zoo import ZooRow
from tinydet.reparam.zoo_run import ZooOptions, fold_in_processes, fold_zoo, read_rows

_ROOT = Path(__file__).resolve().parents[2]
_RIGHT = ZooRow("levit_a", "levit", 224, 50, 4, error64=1e-15, kept={"why": 4})
_WRONG = ZooRow("levit_b", "levit", 224, 10, 1, error64=5e-9)
_DEAD = ZooRow("vgg_c", "vgg", error="its process died (SIGKILL)")


_WORK = """
import os, time
from tinydet.reparam.zoo import ZooRow

def work(name):
    if name == "resnet18":
        os.abort()
    if name == "resnet26":
        raise SystemExit(3)
    if name == "resnet34":
        time.sleep(600)
    return ZooRow(name, "resnet", norms_before=os.getpid())
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_fold_in_processes__a_dead_or_hanging_one_is_a_row(workers, tmp_path, monkeypatch):
    # The processes must be able to import what they run.
    (tmp_path / "zoo_work.py").write_text(_WORK)
    monkeypatch.syspath_prepend(tmp_path)
    from zoo_work import work

    # Without a patience of its own: the first process waits for torch to be imported.
    names = ["resnet10t", "resnet18", "resnet26", "resnet50", "resnet101"]
    rows = {row.model: row for row in fold_in_processes(names, workers, 600.0, work)}
    assert set(rows) == set(names)
    assert rows["resnet18"].problem == "its process died (SIGABRT)"
    assert rows["resnet26"].problem == "its process died (exit code 3)"
    done = [rows[name] for name in ("resnet10t", "resnet50", "resnet101")]
    assert not any(row.problem for row in done)
    pids = {row.norms_before for row in done}
    assert len(pids | {os.getpid()}) == 4
    (row,) = fold_in_processes(["resnet34"], workers, 0.5, work)
    assert row.problem == "not done after 0.5 s (--timeout)"
    assert not multiprocessing.active_children()


@pytest.fixture
def fake_folds(monkeypatch):
    """Replaces the processes: notes the models asked for, can be interrupted."""
    asked = []

    def fold_all(names, workers, timeout):
        del workers, timeout
        for name in names:
            asked.append(name)
            if name in fold_all.interrupted:
                raise KeyboardInterrupt
            error = "crashed" if name in fold_all.crashing else ""
            size = (160, 192)
            yield ZooRow(name, "resnet", 128, other_size=size, kept={"why": 2}, error=error)

    fold_all.interrupted, fold_all.crashing, fold_all.asked = set(), set(), asked
    monkeypatch.setattr(zoo_run, "fold_in_processes", fold_all)
    return fold_all


_NAMES = ["resnet101", "resnet18", "resnet34", "resnet50"]


def _fold_zoo(folder, **options):
    screen = StringIO()
    rows = fold_zoo(_NAMES, ZooOptions(folder, **options), Console(file=screen, width=40))
    return rows, screen.getvalue()


def test_fold_zoo__goes_on_where_it_was_killed(tmp_path, fake_folds):
    fake_folds.interrupted.add("resnet34")
    with pytest.raises(KeyboardInterrupt):
        _fold_zoo(tmp_path)
    assert not (tmp_path / "summary.md").exists()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"model": "resnet34", "fam')
    fake_folds.asked.clear()
    fake_folds.interrupted.clear()

    rows, told = _fold_zoo(tmp_path)
    assert fake_folds.asked == ["resnet34", "resnet50"]
    assert [row.model for row in rows] == _NAMES
    assert "2 of 4 models were folded before" in told
    assert rows[0] == ZooRow("resnet101", "resnet", 128, other_size=(160, 192), kept={"why": 2})
    assert len(list(csv.reader((tmp_path / "table.csv").open()))) == 5


def test_fold_zoo__tries_again_what_failed(tmp_path, fake_folds):
    fake_folds.crashing.add("resnet18")
    rows, told = _fold_zoo(tmp_path)
    assert [row.problem for row in rows] == ["", "crashed", "", ""]
    assert "FAILED  resnet18: crashed" in told
    assert "fine    resnet50: norms 0 -> 0" in told
    fake_folds.asked.clear()
    fake_folds.crashing.clear()
    rows, _ = _fold_zoo(tmp_path)
    assert fake_folds.asked == ["resnet18"]
    assert not any(row.problem for row in rows)


def test_fold_zoo__fresh(tmp_path, fake_folds):
    _fold_zoo(tmp_path)
    fold_zoo(["resnet10t"], ZooOptions(tmp_path), Console(file=StringIO()))
    fake_folds.asked.clear()
    fake_folds.interrupted.add("resnet34")
    with pytest.raises(KeyboardInterrupt):
        _fold_zoo(tmp_path, fresh=True)
    assert fake_folds.asked == ["resnet101", "resnet18", "resnet34"]
    # What was not folded anew is not taken for done; other models' results are.
    assert set(read_rows(tmp_path / "rows.jsonl")) == {"resnet101", "resnet18", "resnet10t"}


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout": 0.0}])
def test_fold_zoo__options_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match="--workers must be"):
        _fold_zoo(tmp_path, **options)


def test_rows_survive_the_file(tmp_path):
    rows = [_RIGHT, _WRONG, _DEAD, ZooRow("vgg_d", "vgg", other_size=(160, 192))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    assert list(read_rows(path).values()) == rows


def test_command(tmp_path):
    begin = time.time()
    done = subprocess.run(
        [sys.executable, str(_ROOT / "deploy/reparam.py"), "--zoo", "test_resnet", "test_byob*"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "fine    test_resnet: norms 15 -> 0" in done.stdout
    rows = read_rows(tmp_path / "runs/zoo/rows.jsonl")
    assert set(rows) == {"test_resnet", "test_byobnet"}
    assert all(0 < row.seconds < time.time() - begin for row in rows.values())
    assert (tmp_path / "runs/zoo/summary.md").read_text().strip() in done.stdout


@pytest.fixture
def call(monkeypatch):
    """Runs the command's `main` in this process, with the zoo replaced by given rows."""
    script = runpy.run_path(str(_ROOT / "deploy/reparam.py"))

    def call(*arguments, rows=()):
        asked = []

        def fold_zoo(patterns, options):
            asked.append((patterns, options))
            return list(rows)

        monkeypatch.setattr(zoo_run, "fold_zoo", fold_zoo)
        script["main"](script["_parser"]().parse_args(arguments))
        return asked

    return call


def test_command__options(call):
    assert call("--zoo") == [([], ZooOptions(Path("runs/zoo"), 1, 600.0, fresh=False))]
    given = ["--zoo", "a*", "b", "--out", "x", "--workers", "2", "--timeout", "5", "--fresh"]
    assert call(*given) == [(["a*", "b"], ZooOptions(Path("x"), 2, 5.0, fresh=True))]


def test_command__a_problem_is_exit_status_1(call):
    call("--zoo", rows=[_RIGHT, _RIGHT])
    for wrong in (_WRONG, _DEAD):
        with pytest.raises(SystemExit) as stop:
            call("--zoo", rows=[_RIGHT, wrong])
        assert stop.value.code == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["best.pt", "--zoo"], "best.pt: --zoo folds timm's models, and no checkpoint"),
        (["--fresh"], "--workers, --timeout and --fresh are for --zoo"),
        (["--workers", "0"], "--workers, --timeout and --fresh are for --zoo"),
    ],
)
def test_command__options_that_do_not_go_together(arguments, error, call):
    with pytest.raises(ValueError, match=error):
        call(*arguments)
