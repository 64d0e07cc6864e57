"""The experiments side by side: counted, timed in turns; accuracy only where measured."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from tinydet.deployment import zoo
from tinydet.deployment.flops import compare_counters, count
from tinydet.deployment.fold_checkpoint import both_forms
from tinydet.deployment.images import random_images
from tinydet.deployment.past_runs import find_past_runs
from tinydet.deployment.timer import Timing
from tinydet.deployment.zoo import find_experiments, run_experiment_zoo
from tinydet.experiment_file import load_experiment

# Many tests count the same few networks.
_forms = functools.cache(both_forms)


@functools.cache
def _count(model, shape):
    return count(model, random_images(shape[0], shape[2:]))


@pytest.fixture
def folder(two_experiments, monkeypatch):
    """A working folder with the experiments "narrow" and "wide"."""
    monkeypatch.setattr(zoo, "both_forms", _forms)
    monkeypatch.setattr(zoo, "count", lambda model, images: _count(model, tuple(images.shape)))
    return two_experiments


def _go(patterns=(), **options):
    options = {"turns": 2, "device": "cpu", "out": Path("runs/zoo"), **options}
    lines = list(run_experiment_zoo(find_experiments(patterns), **options))
    rows = json.loads((options["out"] / "experiments.json").read_text())["rows"]
    return {row["experiment"]: row for row in rows}, lines


def _stub_times(monkeypatch):
    """Timing without running: 1, 2, 3, ... ms; returns the names in the order they were timed."""
    order = []

    def measure(candidates, batches, images):
        (name,) = candidates
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
        training, deploy = (_count(form, (1, 3, 64, 64)) for form in forms)
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


def test_an_interrupted_run_is_continued(folder, monkeypatch, every_step_said):
    order = _stub_times(monkeypatch)
    steps = run_experiment_zoo(find_experiments(()), turns=2, device="cpu")
    for line in steps:
        if line.startswith("timed       turn 1"):
            break
    steps.close()
    path = folder / "runs/zoo/experiments.jsonl"
    with path.open("a") as file:
        file.write('{"key": "abc", "tur')  # The kill came in the middle of a line.

    counted = []
    monkeypatch.setattr(zoo, "count", lambda *_: counted.append(1))
    rows, _ = _go()
    assert not counted
    said = [line.split(", ")[0] for line in every_step_said()]
    counts = ("1/4", "2/4", "1/2", "2/2")
    assert said == [f"timing the experiments: {count} turns" for count in counts]
    assert len(order) == 4
    assert (rows["narrow"]["latency_ms"], rows["wide"]["latency_ms"]) == (2.0, 3.0)
    again, lines = _go()
    assert again == rows
    assert len(order) == 4
    assert not [line for line in lines if line.startswith(("counted", "timed       turn"))]


@pytest.mark.usefixtures("folder")
def test_figures_of_something_else_are_not_reused(monkeypatch):
    order = _stub_times(monkeypatch)
    first, _ = _go(["narrow"], turns=1)
    Path("experiments/narrow.py").write_text(Path("experiments/wide.py").read_text())
    second, _ = _go(["narrow"], turns=1)
    assert second["narrow"]["params_deploy"] > first["narrow"]["params_deploy"]
    _go(["narrow"], turns=1, size=(32, 64))
    _go(["narrow"], turns=1, fresh=True)
    assert [shape for _, shape in order] == [(1, 3, 64, 64)] * 2 + [(1, 3, 32, 64), (1, 3, 64, 64)]


@pytest.mark.usefixtures("folder")
def test_a_broken_experiment_does_not_stop_the_others(monkeypatch):
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


def test_accuracy_is_plotted_and_its_command_recorded(folder, write_run, monkeypatch):
    _stub_times(monkeypatch)
    ran = load_experiment("experiments/narrow.py", ["data.root=/data/cats", "train.epochs=3"])
    run = write_run("narrow", 1, ran, AP50=0.625, epochs=3)
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
def test_rows__mean_and_deviation_over_seeds_of_the_newest_run(write_run, monkeypatch):
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
        write_run("narrow", number, ran, AP50=ap50, epochs=ran.train.epochs)
    assert find_past_runs(own).ap50 == (0.3, 0.26, 0.25)
    rows, _ = _go()
    assert rows["narrow"]["command"].endswith("narrow.py --set data.root=/data/cats")
    # By hand: mean 0.27, deviations 0.03, 0.01, 0.02, variance 0.0014 / 2.
    assert "| 27.0 ± 2.6 (3) |" in Path("runs/zoo/experiments.md").read_text()


def test_find_experiments(folder):
    narrow, wide = Path("experiments/narrow.py"), Path("experiments/wide.py")
    assert find_experiments(()) == [narrow, wide]
    assert find_experiments(["w*", "wide"]) == [wide]
    assert find_experiments([str(narrow)]) == [narrow]
    with pytest.raises(ValueError, match=r"wied: no such experiment .* did you mean .*wide\.py"):
        find_experiments(["wied"])
    with pytest.raises(ValueError, match="no experiments there"):
        find_experiments((), folder / "elsewhere")


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
        _go(**options)
    assert not (folder / "runs").exists()
