"""The experiments side by side: counted, timed in turns; accuracy only where measured."""

import dataclasses
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tinydet.config import Data, Experiment, Model, Train
from tinydet.deployment import zoo
from tinydet.deployment.find_experiments import find_experiments
from tinydet.deployment.flops import compare_counters, count
from tinydet.deployment.forms import both_forms
from tinydet.deployment.images import random_images
from tinydet.deployment.measured import newest_measured, train_command
from tinydet.deployment.speed import Timing
from tinydet.deployment.zoo import ExperimentZooOptions, run_experiment_zoo
from tinydet.deployment.zoo_table import ZooRow, accuracy_points, markdown, write_zoo
from tinydet.experiment_file import experiment_to_dict, load_experiment
from tinydet.report.figures import Point

_ROOT = Path(__file__).resolve().parents[2]
_TINY = """
from tinydet.config import Data, Experiment, Model, Train
experiment = Experiment(
    model=Model(backbone="test_resnet", encoder_channels={channels},
                encoder_mid_channels=16, dilations=(2,), cls_convs=1, reg_convs=1),
    data=Data(root="datasets/none", classes=("cat", "dog"), image_size=40),
    train=Train(epochs=2),
)
"""


_forms = functools.cache(both_forms)  # The same few, again and again.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the experiments "narrow" and "wide"."""
    monkeypatch.setattr(zoo, "both_forms", _forms)
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/narrow.py").write_text(_TINY.format(channels=16))
    Path("experiments/wide.py").write_text(_TINY.format(channels=32))
    return tmp_path


def _write_run(name, number, experiment, **metrics):
    run = Path("runs") / name / str(number)
    run.mkdir(parents=True)
    (run / "experiment.json").write_text(json.dumps(experiment_to_dict(experiment)))
    (run / "metrics.json").write_text(json.dumps({"AP50": 0.5, "epochs": 2, **metrics}))
    os.utime(run / "metrics.json", (1000 + number, 1000 + number))
    return run


def _go(options=None, patterns=()):
    options = options or ExperimentZooOptions(turns=2, device="cpu")
    told = list(run_experiment_zoo(find_experiments(patterns), options))
    rows = json.loads((options.folder / "experiments.json").read_text())["rows"]
    return {row["experiment"]: row for row in rows}, told


def _stub_times(monkeypatch):
    """Timing without running: 1, 2, 3, ... ms; returns the names in the order they were timed."""
    order = []

    def measure(forms, batches, images, _):
        (name,) = forms
        order.append((name, tuple(batches[0].shape)))
        return {name: Timing(images, [float(len(order))] * images)}

    monkeypatch.setattr(zoo, "measure", measure)
    return order


def test_rows__counts_are_those_of_both_forms_and_detectors_take_turns(folder, monkeypatch):
    order = _stub_times(monkeypatch)
    rows, _ = _go()
    assert list(rows) == ["narrow", "wide"]
    assert order == [(name, (1, 3, 64, 64)) for name in ("narrow", "wide")] * 2
    table = Path("runs/zoo/experiments.md").read_text().splitlines()
    for name, row in rows.items():
        forms = _forms(load_experiment(f"experiments/{name}.py"))
        training, deploy = (count(form, random_images(1, (64, 64))) for form in forms)
        assert row["params_training"] == training.params
        assert row["params_deploy"] == deploy.params
        assert row["macs_training"] == training.multiply_adds
        assert row["macs_deploy"] == deploy.multiply_adds
        assert row["counters_training"] == compare_counters(training)
        assert row["counters_deploy"] == compare_counters(deploy)
        assert f"- {name}, folded: {compare_counters(deploy)}" in table
        assert row["ap50"] == []
        assert row["images"] == 20
    # Turns 1 and 3, 2 and 4, ten images each: the medians.
    assert (rows["narrow"]["latency_ms"], rows["wide"]["latency_ms"]) == (2.0, 3.0)
    assert not (folder / "runs/zoo/accuracy.png").exists()


def test_a_killed_run_goes_on_where_it_was(folder, monkeypatch):
    order = _stub_times(monkeypatch)
    options = ExperimentZooOptions(turns=2, device="cpu")
    steps = run_experiment_zoo(find_experiments(()), options)
    for line in steps:
        if line.startswith("timed       turn 1"):
            break
    steps.close()
    path = folder / "runs/zoo/experiments.jsonl"
    with path.open("a") as file:
        file.write('{"key": "abc", "tur')  # The kill came in the middle of a line.

    counted = []
    monkeypatch.setattr(zoo, "count", lambda *_: counted.append(1))
    rows, _ = _go(options)
    assert not counted
    assert len(order) == 4
    assert (rows["narrow"]["latency_ms"], rows["wide"]["latency_ms"]) == (2.0, 3.0)
    again, told = _go(options)
    assert again == rows
    assert len(order) == 4
    assert not [line for line in told if line.startswith(("counted", "timed       turn"))]


@pytest.mark.usefixtures("folder")
def test_figures_of_something_else_are_not_taken(monkeypatch):
    order = _stub_times(monkeypatch)
    options = ExperimentZooOptions(turns=1, device="cpu")
    first, _ = _go(options, ["narrow"])
    Path("experiments/narrow.py").write_text(_TINY.format(channels=24))
    second, _ = _go(options, ["narrow"])
    assert second["narrow"]["params_deploy"] > first["narrow"]["params_deploy"]
    _go(dataclasses.replace(options, size=(32, 64)), ["narrow"])
    _go(dataclasses.replace(options, fresh=True), ["narrow"])
    assert [shape for _, shape in order] == [(1, 3, 64, 64)] * 2 + [(1, 3, 32, 64), (1, 3, 64, 64)]


@pytest.mark.usefixtures("folder")
def test_one_broken_experiment_ends_no_others(monkeypatch):
    _stub_times(monkeypatch)
    Path("experiments/broken.py").write_text("experiment = 1")
    Path("experiments/unbuilt.py").write_text(
        "from tinydet.config import *\nexperiment = Experiment(model=Model(backbone='resnit18'))"
    )
    with pytest.raises(ValueError, match="2 of 4 experiments failed: broken, unbuilt"):
        _go()
    rows = json.loads(Path("runs/zoo/experiments.json").read_text())["rows"]
    assert ["resnit18" in row["error"] for row in rows] == [False, False, True, False]
    assert [row["latency_ms"] is None for row in rows] == [True, False, True, False]
    assert "- broken: ConfigError" in Path("runs/zoo/experiments.md").read_text()


def test_accuracy_is_plotted_and_its_command_recorded(folder, monkeypatch):
    _stub_times(monkeypatch)
    ran = load_experiment("experiments/narrow.py", ["data.root=/data/cats", "train.epochs=3"])
    run = _write_run("narrow", 1, ran, AP50=0.625, epochs=3)
    rows, _ = _go()
    narrow = rows["narrow"]
    assert (narrow["ap50"], narrow["data"], narrow["run"]) == ([0.625], "cats test", str(run))
    assert narrow["command"] == (
        "python tools/train.py experiments/narrow.py --set data.root=/data/cats train.epochs=3"
    )
    assert rows["wide"]["ap50"] == []
    plot = folder / "runs/zoo/accuracy.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    (run / "metrics.json").unlink()
    _go()
    assert not plot.exists()


@pytest.mark.usefixtures("folder")
def test_newest_measured__takes_the_newest_finished_run_of_this_network():
    own = load_experiment("experiments/narrow.py")
    assert newest_measured(own) is None
    other = dataclasses.replace(own, model=dataclasses.replace(own.model, encoder_channels=64))
    three = dataclasses.replace(own, data=dataclasses.replace(own.data, classes=("a", "b", "c")))
    _write_run("narrow", 1, own, AP50=0.3)
    chosen = _write_run("narrow", 2, own, AP50=0.2)
    _write_run("narrow", 3, own, AP50=0.9, epochs=1)  # not finished
    _write_run("narrow", 4, other, AP50=0.9)
    _write_run("narrow", 5, three, AP50=0.9)
    _write_run("narrow", 6, own, AP50=None)
    (_write_run("narrow", 7, own) / "experiment.json").write_text('{"name": ')
    (_write_run("narrow", 8, own) / "metrics.json").write_text("[]")
    _write_run("narrower", 9, own, AP50=0.9)
    found = newest_measured(own)
    # Run 1 has the same seed and is older.
    assert (found.run, found.ap50, found.experiment) == (chosen, (0.2,), own)


@pytest.mark.usefixtures("folder")
def test_newest_measured__takes_the_other_seeds_of_the_newest_run(monkeypatch):
    _stub_times(monkeypatch)
    own = load_experiment("experiments/narrow.py", ["data.root=/data/cats"])
    seeds = [
        dataclasses.replace(own, name="as_it_was", train=dataclasses.replace(own.train, seed=seed))
        for seed in range(3)
    ]
    longer = dataclasses.replace(own, train=dataclasses.replace(own.train, epochs=3, seed=9))
    for number, (ran, ap50) in enumerate(
        [(seeds[1], 0.9), (longer, 0.9), (seeds[0], 0.25), (seeds[1], 0.26), (seeds[2], 0.3)]
    ):
        _write_run("narrow", number, ran, AP50=ap50, epochs=ran.train.epochs)
    assert newest_measured(own).ap50 == (0.3, 0.26, 0.25)
    rows, _ = _go()
    assert rows["narrow"]["command"].endswith("narrow.py --set data.root=/data/cats")
    # By hand: mean 0.27, deviations 0.03, 0.01, 0.02, variance 0.0014 / 2.
    assert "| 27.0 ± 2.6 (3) |" in Path("runs/zoo/experiments.md").read_text()


def test_train_command__can_be_read_again(tmp_path):
    base = Experiment(name="e", data=Data(classes=("cat",)))
    ran = Experiment(
        name="e",
        model=Model(dilations=(1, 2), weights="my weights.pt"),
        data=Data(classes=(), keep_ratio=False),
        train=Train(ema_decay=0.5),
    )
    words = train_command(Path("experiments/e.py"), base, ran)
    path = tmp_path / "e.json"
    path.write_text(json.dumps(experiment_to_dict(base)))
    overrides = shlex.split(words)[4:]
    assert len(overrides) == 5
    assert load_experiment(path, overrides) == ran


def test_markdown__what_was_not_measured_is_a_dash():
    rows = [
        ZooRow(
            "a", "a.py", "run a", (32, 64), 2_000_000, 1_500_000, 3 * 10**9, 10**9, latency_ms=4.5
        ),
        ZooRow("b", "b.py", "run b", error="ValueError: no"),
    ]
    lines = markdown(rows, "a machine").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "`run" in line]
    assert cells == [
        ["a", "32x64", "2.00", "1.50", "3.00", "1.00", "4.50", "-", "-", "`run a`"],
        ["b", *["-"] * 8, "`run b`"],
    ]
    assert "a machine" in lines[0]
    assert lines[-1] == "- b: ValueError: no"


def test_accuracy_points__only_measured_rows(tmp_path):
    rows = [
        ZooRow("a", "", "", latency_ms=4.0, ap50=[0.5], data="VOC"),
        ZooRow("b", "", "", latency_ms=4.0),
        ZooRow("c", "", "", ap50=[0.5]),
        ZooRow("d", "", "", latency_ms=9.0, ap50=[0.0, 0.02], data="VOC"),
    ]
    a, d = accuracy_points(rows)
    assert a == Point("a", 4.0, 50.0, "VOC", 0.0)
    assert (d.name, d.x, d.y, d.group) == ("d", 9.0, 1.0, "VOC")
    assert d.spread == pytest.approx(2**0.5)
    assert len(write_zoo(rows, "", tmp_path)) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_find_experiments(folder):
    narrow, wide = Path("experiments/narrow.py"), Path("experiments/wide.py")
    assert find_experiments(()) == [narrow, wide]
    assert find_experiments(["w*", "wide"]) == [wide]
    assert find_experiments([str(narrow)]) == [narrow]
    with pytest.raises(ValueError, match=r"wied: no such experiment .* did you mean .*wide\.py"):
        find_experiments(["wied"])
    with pytest.raises(ValueError, match="no experiments there"):
        find_experiments((), folder / "elsewhere")


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/zoo.py", *map(str, arguments)],
        cwd=_ROOT,
        env={"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command(tmp_path):
    sizes = ["--size", 64, 64, "--turns", 1, "--threads", 1, "--device", "cpu"]
    done = _run("quickstart", "--out", tmp_path, *sizes)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "experiments.json").read_text())["rows"]
    assert row["experiment"] == "quickstart"
    assert row["size"] == [64, 64]
    assert row["latency_ms"] > 0
    assert row["images"] == 10


def test_command__a_mistake_is_one_line(tmp_path):
    done = _run("quikstart", "--out", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "did you mean experiments/quickstart.py?" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": (64, 60)}, "--size 64 60: both must be multiples of 32"),
        ({"turns": 0}, "--turns 0: must be at least 1"),
        ({"device": "cuda:99"}, "device cuda:99"),
    ],
)
def test_run_experiment_zoo__options_out_of_range(folder, options, says):
    with pytest.raises(ValueError, match=says):
        _go(ExperimentZooOptions(**options))
    assert not (folder / "runs").exists()
