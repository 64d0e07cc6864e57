import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinydet.comparison import cost as cost_module
from tinydet.comparison.cost import Cost, measure_costs, median_interval
from tinydet.deployment.flops import count
from tinydet.deployment.fold_checkpoint import folded_detector
from tinydet.deployment.images import random_images
from tinydet.experiment_file import load_experiment
from tinydet.training.checkpoint import load_checkpoint, save_checkpoint
from tinydet.training.state import experiment_to_dict
from tinydet.yolof.build import build_detector

pytest.importorskip("onnxruntime")


def _coverage(n, rank):
    return 1 - 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n


def test_median_interval__ranks_are_the_tightest_that_hold():
    for n in (6, 8, 15, 20, 51):
        low, high = median_interval(list(range(n, 0, -1)))
        assert low + high == n + 1
        assert _coverage(n, low) >= 0.95 > _coverage(n, low + 1)
    assert median_interval([1.0, 2, 3, 4, 5]) is None
    assert median_interval([]) is None


def test_median_interval__covers_the_median():
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.exponential(size=20).tolist()) for _ in range(2000)]
    covered = np.mean([low <= math.log(2) <= high for low, high in intervals])
    assert 0.945 < covered < 0.975  # exactly 0.959


@pytest.fixture
def untrained(folder):
    """The base and a narrower idea, with a run of each that was never trained."""
    base = load_experiment("base.py")
    idea = replace(base, name="idea", model=replace(base.model, expand="acnet"))
    runs = {}
    for experiment in (base, idea):
        run = folder / "runs" / experiment.name / "1"
        run.mkdir(parents=True)
        detector = build_detector(experiment.model, ("circle", "cross"))
        content = {
            "form": "training",
            "experiment": experiment_to_dict(experiment),
            "classes": ["circle", "cross"],
            "model": detector.state_dict(),
        }
        save_checkpoint(run / "last.pt", content)
        runs[experiment.name] = run
    return [base, idea], runs


@pytest.mark.slow
def test_measure_costs__measured_side_by_side_once(untrained, tmp_path, monkeypatch):
    experiments, runs = untrained
    experiments.append(replace(experiments[0], name="broken"))
    runs["broken"] = tmp_path
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    monkeypatch.setattr(cost_module, "_TURNS", 6)
    found, where = measure_costs(experiments, runs, tmp_path / "costs.json")
    assert "ONNX Runtime" in where
    base, idea = found["base"], found["idea"]
    assert "last.pt: damaged" in found["broken"].problem  # which ends nothing
    assert (base.ratio, base.ratio_interval) == (1.0, (1.0, 1.0))
    assert base.ms_interval[0] <= base.ms <= base.ms_interval[1]
    # Grown branches are folded away again.
    folded = count(
        folded_detector(load_checkpoint(runs["base"] / "last.pt")), random_images(1, (96, 96))
    )
    for cost in (base, idea):
        assert (cost.params, cost.multiply_adds) == (folded.params, folded.multiply_adds)

    monkeypatch.setattr(cost_module, "_measure", lambda *_: pytest.fail("measured again"))
    assert measure_costs(experiments, runs, tmp_path / "costs.json") == (found, where)


def test_measure_costs__of_other_runs_are_measured_anew(untrained, tmp_path, monkeypatch):
    experiments, runs = untrained
    monkeypatch.setattr(cost_module, "_measure", lambda *_: {"base": Cost(1), "idea": Cost(2)})
    measure_costs(experiments, runs, tmp_path / "costs.json")
    monkeypatch.setattr(cost_module, "_measure", lambda *_: {"base": Cost(3), "idea": Cost(4)})
    other = {**runs, "idea": Path("runs/idea/2")}
    found, _ = measure_costs(experiments, other, tmp_path / "costs.json")
    assert found["idea"] == Cost(4)
    assert json.loads((tmp_path / "costs.json").read_text())["costs"]["base"]["params"] == 3


def test_measure_costs__what_cannot_be_exported_has_a_reason(untrained, tmp_path):
    experiments, runs = untrained
    for run in runs.values():
        (run / "last.pt").write_bytes(b"no checkpoint")
    found, _ = measure_costs(experiments, runs, tmp_path / "costs.json")
    for cost in found.values():
        assert (cost.ms, cost.ratio, cost.params) == (None, None, None)
        assert "last.pt: damaged" in cost.problem
