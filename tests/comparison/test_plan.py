import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinydet.comparison import plan as plan_module
from tinydet.comparison.budget import parse_budget
from tinydet.comparison.plan import load_experiments, make_plan
from tinydet.config import ConfigError
from tinydet.training.profile import StepTime

_FILES = [Path("base.py"), Path("copy.py"), Path("idea.py")]


@pytest.fixture
def clock(monkeypatch):
    """A clock that runs slower each time it is looked at; the list of experiments it timed."""
    timed = []

    def time_steps(experiment, steps):
        del steps
        timed.append(experiment.name)
        return StepTime(float(len(timed)), 3, "bfloat16", "channels_last")

    monkeypatch.setattr(plan_module, "time_steps", time_steps)
    return timed


def _plan(budget, files=_FILES, folder=None, overrides=()):
    return make_plan(files, load_experiments(files, overrides), parse_budget(budget), folder)


@pytest.mark.usefixtures("folder")
def test_time_becomes_epochs_once_and_stays(clock):
    plan = _plan("60s")
    # A step took 1 s for the base, 2 s for the idea; the copy is the base's equal.
    assert clock == ["base", "idea"]
    assert [e.train.epochs for e in plan.experiments] == [20, 20, 10]
    assert [e.name for e in plan.experiments] == ["base", "copy", "idea"]
    train = plan.experiments[2].train
    assert (train.dtype, train.memory_format, train.eval_every) == ("bfloat16", "channels_last", 10)
    assert _plan("60s") == plan
    assert clock == ["base", "idea"]


@pytest.mark.usefixtures("folder")
def test_of_two_plans_made_at_once_the_first_one_written_is_everyone_s(monkeypatch):
    seconds = [1.0, 2.0]
    plans = []

    def time_steps(experiment, steps):
        del experiment, steps
        took = seconds.pop(0)
        if seconds:  # Another shard is quicker.
            plans.append(_plan("60s", _FILES[:2]))
        return StepTime(took, 3, "bfloat16", "channels_last")

    monkeypatch.setattr(plan_module, "time_steps", time_steps)
    plans.append(_plan("60s", _FILES[:2]))
    assert plans[0] == plans[1]
    assert [e.train.epochs for e in plans[0].experiments] == [10, 10]


@pytest.mark.usefixtures("folder")
def test_another_comparison_takes_the_bases_epochs_from_the_first(clock):
    first = _plan("60s", _FILES[:2])
    second = _plan("60s", [_FILES[0], _FILES[2]])
    assert clock == ["base", "idea"]
    assert first.folder != second.folder
    assert second.experiments[0] == first.experiments[0]
    # Another budget or model is timed anew.
    _plan("61s", _FILES[:2])
    _plan("60s", _FILES[:2], overrides=["model.encoder_channels=16"])
    assert clock == ["base", "idea", "base", "base"]


@pytest.mark.usefixtures("folder", "clock")
def test_epochs_and_multiply_adds():
    assert [e.train.epochs for e in _plan("7epochs").experiments] == [7, 7, 7]
    plan = _plan("100Gmacs")
    epochs = plan.experiments[0].train.epochs
    written = json.loads((plan.folder / "plan.json").read_text())
    adds = float(written["schedules"]["base"]["reason"].split(" of ")[1].split(" G")[0])
    assert epochs == pytest.approx(100 / (3 * 8 * adds), abs=1)
    with pytest.raises(ValueError, match=r"one epoch takes .*base: 24 images of .* multiply-adds"):
        _plan("0.001Gmacs")


@pytest.mark.usefixtures("folder", "clock")
def test_a_folder_of_another_comparison_is_left_alone(tmp_path):
    _plan("60s", folder=tmp_path / "mine")
    assert _plan("60s", folder=tmp_path / "mine").folder == tmp_path / "mine"
    before = (tmp_path / "mine" / "plan.json").read_bytes()
    for other in (("50s", _FILES), ("60s", _FILES[:2])):
        with pytest.raises(ValueError, match="holds another comparison"):
            _plan(*other, folder=tmp_path / "mine")
    assert (tmp_path / "mine" / "plan.json").read_bytes() == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["base.py"], "give the base and at least one idea"),
        (["base.py", "./base.py"], r"base\.py: given twice"),
        (["base.py", "other/base.py"], r"other/base\.py: named 'base' like base\.py"),
        (["base.py", "coco.py"], r"coco\.py: data\.source is 'folder', .* 'shapes'"),
        (["base.py", "classes.py"], r"classes\.py: data\.classes is \('circle',\)"),
        (["base.py", "split.py"], r"split\.py: data\.test_split is 'trainval'"),
        (["base.py", "nothing.py"], r"nothing\.py"),
    ],
)
def test_what_cannot_be_compared_is_one_line(files, message):
    Path("other").mkdir()
    Path("other/base.py").write_text(Path("base.py").read_text())
    for name, change in (
        ("coco", "source='folder'"),
        ("classes", "classes=('circle',)"),
        ("split", "test_split='trainval'"),
    ):
        Path(f"{name}.py").write_text(
            "from dataclasses import replace\nfrom base import experiment as base\n"
            f"experiment = replace(base, data=replace(base.data, {change}))\n"
        )
    with pytest.raises((ConfigError, OSError), match=message):
        load_experiments([Path(file) for file in files], [])


@pytest.mark.usefixtures("folder")
def test_size_and_augmentation_may_be_the_idea():
    Path("size.py").write_text(
        "from dataclasses import replace\nfrom base import experiment as base\n"
        "experiment = replace(base, data=replace(base.data, image_size=64, workers=1))\n"
    )
    base, idea = load_experiments([Path("base.py"), Path("size.py")], ["train.device=cpu"])
    assert idea.data == replace(base.data, image_size=64, workers=1)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["train.epochs", "train.seed", "train.eval_every"])
def test_what_a_comparison_decides_cannot_be_set(name):
    with pytest.raises(ConfigError, match=f"--set {name}=3: a comparison decides this itself"):
        load_experiments(_FILES, [f"{name}=3"])


@pytest.mark.usefixtures("folder", "clock")
@pytest.mark.parametrize("field", ["schedules", "epochs"])
def test_a_plan_without_a_field_is_one_line(field):
    path = _plan("60s").folder / "plan.json"
    content = json.loads(path.read_text())
    content.pop(field, None)
    for schedule in content.get("schedules", {}).values():
        schedule.pop(field, None)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"plan\.json: is damaged, or of another version; remove"):
        _plan("60s")
    path.unlink()
    assert _plan("60s").folder == path.parent


@pytest.mark.usefixtures("folder", "clock")
def test_another_code_is_another_comparison_and_timed_anew(tmp_path):
    first = _plan("60s", folder=tmp_path / "mine")
    with Path("idea.py").open("a") as file:
        file.write("class Layer: pass\n")
    second = _plan("60s")
    assert first.codes == ("", "", "")
    assert [bool(code) for code in second.codes] == [False, False, True]
    assert second.experiments[2].train.epochs != first.experiments[2].train.epochs
    with pytest.raises(ValueError, match="holds another comparison, of other experiments, other"):
        _plan("60s", folder=tmp_path / "mine")
