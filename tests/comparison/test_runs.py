import json
from dataclasses import replace

import pytest

from tinydet.comparison.runs import finished_run, train_run
from tinydet.config import Experiment
from tinydet.experiment_file import load_experiment
from tinydet.training.results import write_experiment, write_json
from tinydet.training.runs import ClaimedError, claimed


def test_finished_run__not_one_whose_settings_changed_on_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(name="base")
    experiment = replace(experiment, train=replace(experiment.train, device="cpu"))
    run = tmp_path / "runs" / "base" / "1"
    write_experiment(run, experiment)
    write_json(run / "metrics.json", {"epochs": experiment.train.epochs})
    assert finished_run(experiment).resolve() == run
    write_experiment(run, experiment)  # resumed as it was
    assert finished_run(experiment).resolve() == run
    write_experiment(run, experiment, ["train.batch_size 4 -> 16"])
    assert "4 -> 16" in json.loads((run / "sessions.json").read_text())[-1]["changed"]
    assert finished_run(experiment) is None


def test_train_run__one_that_another_process_trains_is_not_trained_twice(folder):
    experiment = load_experiment("base.py")
    run = folder / "runs" / "base" / "1"
    write_experiment(run, experiment)
    (run / "last.pt").touch()
    with claimed(run), pytest.raises(ClaimedError, match="another process is training there"):
        train_run(experiment)
    assert [path.name for path in run.parent.iterdir()] == ["1"]
