"""Whole comparisons of networks that train in a second."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinydet.comparison import compare as compare_module
from tinydet.comparison.compare import Shard, compare, parse_shard
from tinydet.comparison.runs import finished_run
from tinydet.config import ConfigError
from tinydet.evaluation import ImageDetections, evaluate
from tinydet.evaluation.saved_detections import load_detections
from tinydet.evaluation.tide import KINDS
from tinydet.experiment_code import experiment_code
from tinydet.experiment_file import load_experiment
from tinydet.training.nonfinite import DivergedError

_SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "compare.py"
_FILES = [Path("base.py"), Path("copy.py"), Path("idea.py")]
_SET = ("model.score_threshold=0", "model.max_detections=20")  # After so little training.
_OPTIONS = {
    "seeds": 2,
    "budget": "1epochs",
    "metric": "AP50",
    "confidence": 0.95,
    "resamples": 100,
    "overrides": _SET,
}


@pytest.fixture(autouse=True)
def _without_costs(monkeypatch):
    no_costs = {}, "nowhere"  # To export takes longest; test_cost.py does.
    monkeypatch.setattr(compare_module, "measure_costs", lambda *_: no_costs)


def _result(folder):
    (path,) = folder.glob("runs/compare/*/comparison.json")
    return _without_what_varies(json.loads(path.read_text()))


def _without_what_varies(content):
    for one in content["experiments"]:
        del one["training_speed_ratio"], one["runs"]
    return content


@pytest.fixture(scope="module")
def compared(rendered, tmp_path_factory):
    """The folder of a finished comparison, and what it told."""
    folder = tmp_path_factory.mktemp("whole")
    from .conftest import write_experiments

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(compare_module, "measure_costs", lambda *_: ({}, "nowhere"))
        write_experiments(rendered)
        told = list(compare(_FILES, **_OPTIONS))
    return folder, told


def test_the_copy_is_the_same_and_the_idea_is_not(compared):
    folder, told = compared
    base, copy, idea = _result(folder)["experiments"]
    assert base["verdict"] is None
    assert copy["verdict"]["kind"] == "the same"
    assert "copy: the same: all 2 runs detect exactly what the base's do" in told
    assert copy["scores"] == base["scores"] != idea["scores"]
    assert idea["verdict"]["kind"] in ("better", "worse", "can't tell yet")
    assert idea["differences"]["AP50"]["estimate"] == pytest.approx(
        np.mean(idea["scores"]["AP50"]) - np.mean(base["scores"]["AP50"])
    )


def test_scores_are_the_runs_own_metrics(compared):
    folder, _ = compared
    for one in _result(folder)["experiments"]:
        for seed in range(2):
            run = folder / "runs" / one["name"] / str(seed + 1)
            metrics = json.loads((run / "metrics.json").read_text())
            assert metrics["epochs"] == metrics["best_epoch"] == 1
            for metric in ("AP50", "AP"):
                assert one["scores"][metric][seed] == pytest.approx(metrics[metric], rel=1e-9)


def test_every_experiment_sees_the_same_seeds_and_dtype(compared):
    folder, _ = compared
    for name in ("base", "copy", "idea"):
        ran = [load_experiment(folder / "runs" / name / n / "experiment.json") for n in "12"]
        assert [experiment.train.seed for experiment in ran] == [0, 1]
        assert {experiment.train.dtype for experiment in ran} == {"float32"}
    saved = [load_detections(folder / "runs" / "base" / n / "detections.npz") for n in "12"]
    assert not saved[0].same_as(saved[1])


def test_tables(compared):
    folder, told = compared
    (path,) = folder.glob("runs/compare/*/comparison.md")
    text = path.read_text()
    assert text.startswith("# base and its ideas\n\n- **copy** is the same: ")
    assert text.count("| base |") == text.count("| idea |") == 3
    assert any("each interval has 97.5 %, so that all 2 hold together with 95 %" in t for t in told)
    assert not list(path.parent.glob("*.png"))
    assert any(line.startswith("wrote ") and "comparison.md" in line for line in told)


def test_what_changed_is_told_and_drawn_for_the_idea_alone(compared):
    folder, told = compared
    assert [line for line in told if " compared with " in line] == [
        "idea compared with base, first seed"
    ]
    counts = [line for line in told if "at scores of 0.3 or more" in line]
    assert [line.split(",")[0] for line in counts] == ["improved", "worsened"]
    base, _, idea = _result(folder)["experiments"]
    assert idea["AP50_lost"] != base["AP50_lost"]
    assert set(idea["AP50_lost"]) == set(KINDS)


@pytest.fixture
def finished(compared, tmp_path, monkeypatch):
    """A copy of the finished comparison to work in."""
    shutil.copytree(compared[0], tmp_path / "copied", symlinks=True)
    monkeypatch.chdir(tmp_path / "copied")
    return tmp_path / "copied"


def _no_training(*_):
    raise AssertionError("trained again")


def test_started_again_nothing_is_trained_and_all_is_the_same(compared, finished, monkeypatch):
    monkeypatch.setattr(compare_module, "train_run", _no_training)
    shutil.rmtree(finished / "runs" / "compare")
    # Found from the weights alone, as for runs older than saved detections.
    (finished / "runs" / "idea" / "2" / "detections.npz").unlink()
    told = list(compare(_FILES, **_OPTIONS))
    assert sum("finished in runs/" in line for line in told) == 6
    assert _result(finished) == _result(compared[0])


def test_another_comparison_uses_the_runs_of_the_first(finished, monkeypatch, every_step_said):
    trained = []

    def train_run(experiment, code):
        assert not code
        trained.append((experiment.name, experiment.train.seed))
        raise DivergedError("no number")

    monkeypatch.setattr(compare_module, "train_run", train_run)
    Path("other.py").write_text(Path("idea.py").read_text().replace("1e-3", "3e-3"))
    told = list(compare([finished / n for n in ("base.py", "other.py", "idea.py")], **_OPTIONS))
    assert trained == [("other", 0)]
    assert "other, seed 1 of 2: training, run 2 of 6" in told
    assert every_step_said().count("evaluating resampled test sets: 101/101 sets") == 2 * 4
    assert "other: can't tell yet: seed 1 failed: no number" in told
    assert any(line.startswith("idea: ") for line in told)


def test_a_run_of_other_code_is_not_reused_and_one_line_says_so(finished, monkeypatch):
    def train_run(experiment, code):
        raise DivergedError(f"{experiment.name} has code: {bool(code)}")

    monkeypatch.setattr(compare_module, "train_run", train_run)
    with Path("idea.py").open("a") as file:
        file.write("# a comment is no code\n")
    assert any("idea, seed 1 of 2: finished in" in line for line in compare(_FILES, **_OPTIONS))
    with Path("idea.py").open("a") as file:
        file.write("class Layer: pass\n")
    told = list(compare(_FILES, **_OPTIONS))
    assert "idea, seed 1 of 2: runs/idea/1 is of other code and not reused" in told
    assert "idea: can't tell yet: seed 1 failed: idea has code: True" in told
    assert len(list(finished.glob("runs/compare/*/plan.json"))) == 2


def test_code_is_recorded_from_the_start_of_a_run_and_its_own_runs_are_reused(folder):
    with Path("idea.py").open("a") as file:
        file.write("class Layer: pass\n")
    files = [Path("base.py"), Path("idea.py")]
    list(compare(files, **_OPTIONS))
    told = list(compare(files, **_OPTIONS))
    assert sum("finished in runs/" in line for line in told) == 4
    (session,) = json.loads((folder / "runs" / "idea" / "1" / "sessions.json").read_text())
    assert session["code"] == experiment_code(Path("idea.py"))


def test_too_few_test_images_give_no_verdict(finished, monkeypatch, caplog):
    for name in ("base", "copy", "idea"):  # Saved detections are of the images that went.
        for run in (finished / "runs" / name).iterdir():
            (run / "detections.npz").unlink()
    root = Path("set").resolve()
    Path("set").unlink()
    shutil.copytree(root, "set")
    names = Path("set/ImageSets/Main/test.txt")
    names.write_text("\n".join(names.read_text().split()[:2]) + "\n")
    monkeypatch.setattr(compare_module, "train_run", _no_training)
    told = list(compare([Path("base.py"), Path("idea.py")], **_OPTIONS))
    reason = "set (test) has 2 images, too few to tell how much images vary; give at least 3"
    assert any(line.startswith(f"idea: can't tell yet: {reason}") for line in told)
    assert f"there will be no verdict: {reason}" in caplog.text


def test_a_base_that_fails_ends_the_comparison(finished, monkeypatch):
    def train_run(experiment, code):
        assert not code
        raise DivergedError(f"{experiment.name} is lost")

    monkeypatch.setattr(compare_module, "train_run", train_run)
    with pytest.raises(ValueError, match="base, seed 3 of 3: base is lost"):
        list(compare(_FILES, **_OPTIONS | {"seeds": 3}))
    del finished


def test_halving_drops_what_is_hopeless_and_trains_it_no_more(finished, monkeypatch):
    """After two seeds the idea finds nothing, the base a lot; the third is the base's alone."""
    trained = []

    def train_run(experiment, code):
        assert not code
        trained.append((experiment.name, experiment.train.seed))
        return Path("runs") / experiment.name / "1"

    def found(run, experiment, index):
        saved = load_detections(run / "detections.npz")
        rng = np.random.default_rng([ord(run.name), len(experiment.name)])
        detections = []
        for i in range(len(index)):
            truth = index.objects(i)
            kept = rng.random(len(truth.labels)) < (0.9 if run.parts[1] != "idea" else 0.02)
            detections.append(
                ImageDetections(truth.boxes[kept], rng.random(kept.sum()), truth.labels[kept])
            )
        return replace(saved, detections=detections)

    monkeypatch.setattr(compare_module, "train_run", train_run)
    monkeypatch.setattr(compare_module, "run_detections", found)
    options = _OPTIONS | {"seeds": 3, "halving": True, "confidence": 0.9}
    told = list(compare([Path("base.py"), Path("idea.py")], **options))
    assert trained == [("base", 2)]
    (dropped,) = [
        line for line in told if line.startswith("idea: dropped: after 2 seeds; not better")
    ]
    assert "% confidence" in dropped
    del finished


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_verdict(finished, folder):
    files = [Path("base.py"), Path("idea.py")]
    os.chdir(finished)
    list(compare(files, **_OPTIONS, folder=Path("runs/compare/two")))
    os.chdir(folder)
    options = ["--seeds", "2", "--budget", "1epochs", "--set", *_SET, "train.save_minutes=0"]
    with Path("out.txt").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), *map(str, files), *options],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    # In the middle of the second run: its first step is saved, its last one is not.
    while not Path("runs/idea/1/last.previous.pt").is_file():
        assert process.poll() is None, Path("out.txt").read_text()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not Path("runs/idea/1/metrics.json").exists()
    told = list(compare(files, **_OPTIONS))
    assert told[3].startswith("base, seed 1 of 2: finished in")
    assert told[4] == "idea, seed 1 of 2: training, run 2 of 4"
    assert sorted(path.name for path in Path("runs/idea").iterdir()) == ["1", "2"]
    whole = finished / "runs" / "compare" / "two" / "comparison.json"
    assert _result(folder) == _without_what_varies(json.loads(whole.read_text()))


def test_shards_train_each_run_once_and_the_whole_judges(compared, folder, monkeypatch):
    for share in ("3/4", "1/4", "4/4", "2/4"):
        told = list(compare(_FILES, **_OPTIONS, shard=parse_shard(share)))
        assert f"shard {share}: its {2 if share < '3' else 1} runs are finished" in told[-2]
    assert not list(folder.glob("runs/compare/*/comparison.json"))
    for name in ("base", "copy", "idea"):
        assert sorted(run.name for run in Path("runs", name).iterdir()) == ["1", "2"]
    monkeypatch.setattr(compare_module, "train_run", _no_training)
    list(compare(_FILES, **_OPTIONS))
    assert _result(folder) == _result(compared[0])


@pytest.mark.slow
def test_shards_at_once_one_of_them_killed_end_with_the_same_verdict(finished, folder):
    files = [Path("base.py"), Path("idea.py")]
    os.chdir(finished)
    list(compare(files, **_OPTIONS, folder=Path("runs/compare/two")))
    os.chdir(folder)
    options = ["--seeds", "2", "--budget", "1epochs", "--set", *_SET, "train.save_minutes=0"]

    def start(share):
        with Path(f"{share[0]}.txt").open("w") as out:
            return subprocess.Popen(
                [sys.executable, str(_SCRIPT), *map(str, files), *options, "--shard", share],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    shards = [start(share) for share in ("1/3", "2/3", "3/3")]
    while not list(Path("runs").glob("idea/*/last.previous.pt")):  # The second run, of shard 2.
        assert shards[1].poll() is None, Path("2.txt").read_text()
        time.sleep(0.001)
    os.killpg(shards[1].pid, signal.SIGKILL)
    shards[1].wait()
    shards[1] = start("2/3")
    for number, shard in enumerate(shards, 1):
        assert shard.wait(250) == 0, Path(f"{number}.txt").read_text()
    told = list(compare(files, **_OPTIONS))
    assert sum("finished in runs/" in line for line in told) == 4
    for name in ("base", "idea"):
        assert sorted(run.name for run in Path("runs", name).iterdir()) == ["1", "2"]
    whole = finished / "runs" / "compare" / "two" / "comparison.json"
    assert _result(folder) == _without_what_varies(json.loads(whole.read_text()))


def test_a_run_of_other_settings_is_no_run_of_this(compared, monkeypatch):
    folder, _ = compared
    monkeypatch.chdir(folder)
    ran = load_experiment("runs/base/1/experiment.json")
    assert finished_run(ran) == Path("runs/base/1")
    elsewhere = replace(ran, train=replace(ran.train, device="auto", eval_every=1))
    assert finished_run(elsewhere) == Path("runs/base/1")
    for other in (
        replace(ran, train=replace(ran.train, seed=7)),
        replace(ran, train=replace(ran.train, epochs=3)),
        replace(ran, train=replace(ran.train, dtype="bfloat16")),
        replace(ran, optim=replace(ran.optim, lr=0.1)),
        replace(ran, name="idea"),
    ):
        assert finished_run(other) is None


def test_saved_detections_are_those_of_the_metrics(compared, monkeypatch):
    folder, _ = compared
    monkeypatch.chdir(folder)
    from tinydet.data.dataset import load_split
    from tinydet.training.evaluate import ground_truth

    experiment = load_experiment("runs/idea/1/experiment.json")
    index = load_split(experiment.data, "test")
    saved = load_detections(Path("runs/idea/1/detections.npz"))
    metrics = evaluate(saved.detections, ground_truth(index), index.classes)
    written = json.loads(Path("runs/idea/1/metrics.json").read_text())
    assert metrics.as_dict()["AP"] == pytest.approx(written["AP"])


@pytest.mark.parametrize("metric", ["AP50", "AP"])
def test_test_images_without_objects_are_refused_before_training(folder, rendered, metric):
    Path("set").unlink()
    shutil.copytree(rendered, "set")
    for path in Path("set/Annotations").glob("test_*.xml"):
        path.write_text(path.read_text().replace("<difficult>0<", "<difficult>1<"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=r"set \(test\): its 8 images have no object to find"):
            list(compare(_FILES, **_OPTIONS | {"metric": metric}))
    assert not (folder / "runs").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, "--seeds 1: one run does not show"),
        ({"metric": "mAP"}, "--metric mAP: must be one of AP50, AP"),
        ({"confidence": 95}, "--confidence 95: must be at least 0.5"),
        ({"budget": "lots"}, "--budget lots: give training time"),
        ({"shard": Shard(1, 2), "halving": True}, "--shard: cannot be with --halving"),
        ({"halving": True}, "--halving: looks before the last seed, and --seeds 2"),
    ],
)
def test_wrong_options_are_one_line(change, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        list(compare(_FILES, **_OPTIONS | change))
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "1/2/3", "-1/3", ""])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"--shard .*: give K/N"):
        parse_shard(text)
