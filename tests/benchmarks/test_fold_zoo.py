import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import fold_zoo
import pytest
from fold_row import FoldRow
from fold_zoo import fold_in_processes, read_rows

_ROOT = Path(__file__).resolve().parents[2]
_WORK = """
import os, time
from fold_row import FoldRow

def work(name):
    if name == "resnet18":
        os.abort()
    if name == "resnet26":
        raise SystemExit(3)
    if name == "resnet34":
        time.sleep(600)
    return FoldRow(name, "resnet", norms_before=os.getpid())
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_fold_in_processes__a_dead_or_hanging_process_is_a_row(workers, tmp_path, monkeypatch):
    # The processes must be able to import what they run.
    (tmp_path / "zoo_work.py").write_text(_WORK)
    monkeypatch.syspath_prepend(tmp_path)
    from zoo_work import work

    # A long timeout: the first process waits for torch to be imported.
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
    # Stopped early, as by Ctrl-C: what hangs is killed.
    rows = fold_in_processes(["resnet10t", "resnet34"], 2, 600.0, work)
    assert next(rows).model == "resnet10t"
    rows.close()
    assert not multiprocessing.active_children()


@pytest.fixture
def fake_folds(monkeypatch):
    """Replaces the processes: notes the models asked for, can be interrupted."""

    def fold_all(names, workers, timeout, work):
        del workers, timeout, work
        for name in names:
            fold_all.asked.append(name)
            if name in fold_all.interrupted:
                raise KeyboardInterrupt
            error = "crashed" if name in fold_all.crashing else ""
            sizes = ((160, 192),)
            yield FoldRow(name, "resnet", 128, other_sizes=sizes, kept={"why": 2}, error=error)

    fold_all.interrupted, fold_all.crashing, fold_all.asked = set(), set(), []
    monkeypatch.setattr(fold_zoo, "fold_in_processes", fold_all)
    return fold_all


_NAMES = ["resnet101", "resnet18", "resnet34", "resnet50"]


def test_fold_zoo__resumes_and_repeats_what_failed(tmp_path, fake_folds, capsys):
    fake_folds.interrupted.add("resnet34")
    fake_folds.crashing.add("resnet18")
    with pytest.raises(KeyboardInterrupt):
        fold_zoo.fold_zoo(_NAMES, tmp_path)
    assert not (tmp_path / "summary.md").exists()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"model": "resnet34", "fam')
    for names in (fake_folds.asked, fake_folds.interrupted, fake_folds.crashing):
        names.clear()

    rows = fold_zoo.fold_zoo(_NAMES, tmp_path)
    assert fake_folds.asked == ["resnet18", "resnet34", "resnet50"]
    assert [row.model for row in rows] == _NAMES
    assert not any(row.problem for row in rows)
    screen = capsys.readouterr().out
    assert "1 of 4 models were folded before" in screen
    assert "FAILED  resnet18: crashed" in screen
    assert "ok      resnet50: norms 0 -> 0" in screen
    assert rows[0] == FoldRow(
        "resnet101", "resnet", 128, other_sizes=((160, 192),), kept={"why": 2}
    )
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 5


def test_fold_zoo__fresh(tmp_path, fake_folds):
    fold_zoo.fold_zoo([*_NAMES, "resnet10t"], tmp_path)
    fake_folds.asked.clear()
    fake_folds.interrupted.add("resnet34")
    with pytest.raises(KeyboardInterrupt):
        fold_zoo.fold_zoo(_NAMES, tmp_path, fresh=True)
    assert fake_folds.asked == ["resnet101", "resnet18", "resnet34"]
    # What was not folded again does not count as done; results of other models are kept.
    assert set(read_rows(tmp_path / "rows.jsonl")) == {"resnet101", "resnet18", "resnet10t"}


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout": 0.0}])
def test_fold_zoo__options_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match="--workers must be"):
        fold_zoo.fold_zoo(_NAMES, tmp_path, **options)


def test_rows_survive_the_file(tmp_path):
    rows = [
        FoldRow("levit_a", "levit", 224, 50, 4, error64=1e-15, kept={"why": 4}),
        FoldRow("vgg_c", "vgg", error="its process died (SIGKILL)"),
        FoldRow("vgg_d", "vgg", other_sizes=((160, 192), (123, 131)), peak_mb=5.5),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    assert list(read_rows(path).values()) == rows


def test_main__exit_status(monkeypatch):
    given = ["a*", "b", "--out", "x", "--workers", "2", "--timeout", "5", "--fresh"]
    given += ["--models", "list.txt"]
    args = fold_zoo._parser().parse_args(given)
    asked, rows = [], [FoldRow("a", "vgg")]
    monkeypatch.setattr(fold_zoo, "fold_zoo", lambda *given: asked.append(given) or rows)
    fold_zoo.main(args)
    assert asked == [(["a*", "b"], Path("x"), 2, 5.0, True, Path("list.txt"))]
    rows.append(FoldRow("b", "vgg", error64=5e-9))
    with pytest.raises(SystemExit) as stop:
        fold_zoo.main(args)
    assert stop.value.code == 1


@pytest.mark.slow
def test_command(tmp_path):
    script = [sys.executable, str(_ROOT / "tests/benchmarks/fold_zoo.py")]
    done = subprocess.run(
        [*script, "test_resnet", "test_byob*"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "ok      test_resnet: norms 15 -> 0" in done.stdout
    rows = read_rows(tmp_path / "runs/zoo/rows.jsonl")
    assert set(rows) == {"test_resnet", "test_byobnet"}
    assert all(row.seconds > 0 for row in rows.values())
    assert (tmp_path / "runs/zoo/summary.md").read_text().strip() in done.stdout
