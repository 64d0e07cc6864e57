"""A test split without an object that counts: average precision is undefined, and all say so."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinydet.comparison.error_analysis import error_lines
from tinydet.config import ConfigError
from tinydet.data.dataset import load_split
from tinydet.evaluation import evaluate
from tinydet.evaluation.metrics import UNDEFINED
from tinydet.report.run_folder import read_log, summarize
from tinydet.training import loop
from tinydet.training.checkpoint import read_checkpoint
from tinydet.training.evaluate import detect_split, ground_truth, require_objects
from tinydet.training.loop import train
from tinydet.training.runs import Saver
from tinydet.yolof.build import build_detector


def _mark_difficult(root, split="test"):
    for name in (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
        path = root / "Annotations" / f"{name}.xml"
        path.write_text(path.read_text().replace("<difficult>0<", "<difficult>1<"))


@pytest.fixture(scope="module")
def hopeless(tiny_experiment, tmp_path_factory):
    """An experiment whose test images have difficult objects alone."""
    root = tmp_path_factory.mktemp("difficult") / "set"
    shutil.copytree(tiny_experiment.data.root, root)
    _mark_difficult(root)
    return replace(tiny_experiment, data=replace(tiny_experiment.data, root=str(root)))


def test_a_split_to_judge_detectors_on(tiny_experiment, hopeless):
    require_objects(load_split(tiny_experiment.data, "test"))
    require_objects(load_split(hopeless.data, "trainval"))
    with pytest.raises(ConfigError, match=r"set \(test\): its 8 images have no object to find"):
        require_objects(load_split(hopeless.data, "test"))


def test_a_split_to_train_on_has_objects_to_learn(tiny_experiment, tmp_path):
    shutil.copytree(tiny_experiment.data.root, tmp_path / "set")
    _mark_difficult(tmp_path / "set", "trainval")
    data = replace(tiny_experiment.data, root=str(tmp_path / "set"))
    with pytest.raises(ConfigError, match=r"set \(trainval\): all of its objects are difficult"):
        train(replace(tiny_experiment, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_says_it_and_keeps_the_newest_weights(hopeless, tmp_path, caplog):
    caplog.set_level("INFO")
    run = tmp_path / "1"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy's, of means of nothing
        train(hopeless, run)
        told = list(error_lines(run, device="auto"))
    evaluations = [line for line in caplog.messages if line.startswith("epoch ") and "AP50" in line]
    assert len(evaluations) == 2
    assert all(f"AP50 and AP {UNDEFINED}, 0." in line for line in evaluations)
    assert "nan" not in caplog.text
    assert "-1.0" not in caplog.text
    assert read_checkpoint(run / "best.pt")["epoch"] == 2
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["AP50"], metrics["best_epoch"]) == (None, 2)
    assert f"AP50 and AP are {UNDEFINED}." in (run / "report.html").read_text()
    assert told[-1] == f"AP50 is {UNDEFINED}"
    header, row = summarize([("run", read_log(run / "log.jsonl"), None)])
    assert row.split()[2:5] == ["-", "-", "-"], header


def test_a_known_best_is_not_written_over_by_an_unknown(tiny_experiment, tmp_path, monkeypatch):
    real = loop.evaluate_detector
    calls = []

    def evaluated(detector, index, *others):
        calls.append(1)
        metrics = real(detector, index, *others)
        truth = [replace(t, difficult=t.difficult | True) for t in ground_truth(index)]
        return metrics if len(calls) == 1 else evaluate(metrics.detections, truth, index.classes)

    monkeypatch.setattr(loop, "evaluate_detector", evaluated)
    train(tiny_experiment, tmp_path / "1")
    assert read_checkpoint(tmp_path / "1" / "best.pt")["epoch"] == 1
    metrics = json.loads((tmp_path / "1" / "metrics.json").read_text())
    assert (metrics["best_epoch"], metrics["last_AP50"]) == (1, None)


def test_a_best_that_could_not_be_written_has_no_figure(
    tiny_experiment, tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO")
    monkeypatch.setattr(Saver, "save_best", lambda _: False)
    once = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=1))
    train(once, tmp_path / "1")
    assert not Path(tmp_path / "1" / "best.pt").exists()
    assert "AP50 0." in caplog.text
    assert "best AP50" not in caplog.text


def test_an_evaluation_says_how_far_it_is(tiny_experiment, every_step_said):
    data = tiny_experiment.data
    index = load_split(data, "test")
    detector = build_detector(tiny_experiment.model, index.classes).eval()
    detect_split(detector, index, data, 3, torch.device("cpu"))
    said = [line.split(", ")[0] for line in every_step_said() if line.startswith("evaluating")]
    assert said == [f"evaluating: {i}/8 images" for i in (3, 6, 8)]
