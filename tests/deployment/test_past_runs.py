"""Accuracy is looked up only in finished runs of the same network."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from tinydet.config import Data, Experiment, Model, Train
from tinydet.deployment.past_runs import find_past_runs, train_command
from tinydet.experiment_file import experiment_to_dict, load_experiment


@pytest.mark.usefixtures("two_experiments")
def test_find_past_runs__takes_the_newest_finished_run_of_this_network(write_run):
    own = load_experiment("experiments/narrow.py")
    assert find_past_runs(own) is None
    other = dataclasses.replace(own, model=dataclasses.replace(own.model, encoder_channels=64))
    three = dataclasses.replace(own, data=dataclasses.replace(own.data, classes=("a", "b", "c")))
    write_run("narrow", 1, own, AP50=0.3)
    chosen = write_run("narrow", 2, own, AP50=0.2)
    write_run("narrow", 3, own, AP50=0.9, epochs=1)  # not finished
    write_run("narrow", 4, other, AP50=0.9)
    write_run("narrow", 5, three, AP50=0.9)
    write_run("narrow", 6, own, AP50=None)
    (write_run("narrow", 7, own) / "experiment.json").write_text('{"name": ')
    (write_run("narrow", 8, own) / "metrics.json").write_text("[]")
    write_run("narrower", 9, own, AP50=0.9)
    found = find_past_runs(own)
    # Run 1 has the same seed and is older.
    assert (found.folder, found.ap50, found.experiment) == (chosen, (0.2,), own)
    assert find_past_runs(own, "code") is None


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
