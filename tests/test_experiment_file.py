import dataclasses
import functools
import json
import math
import pickle
import sys
import types
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.checked import ASCENDING
from tinydet.config import Augment, ConfigError, Experiment
from tinydet.experiment_file import (
    experiment_from_dict,
    experiment_to_dict,
    load_experiment,
    override,
)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("train.epochs=3", 3),
        ("train.epochs = 3", 3),
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1", 1.0),
        ("optim.backbone_lr_factor=1/3", 1 / 3),
        ("optim.milestones=1/2,0.75", (0.5, 0.75)),
        ("data.keep_ratio=false", False),
        ("data.keep_ratio=True", True),
        ("model.dilations=2,4,6", (2, 4, 6)),
        ("model.dilations=(2, 4)", (2, 4)),
        ("model.dilations=2", (2,)),
        ("model.dilations=", ()),
        ("model.anchor_scales=1,2", (1.0, 2.0)),
        ("data.classes=cat,dog", ("cat", "dog")),
        ("data.classes=[cat, 'dog']", ("cat", "dog")),
        ("data.classes=cat (big),dog (small)", ("cat (big)", "dog (small)")),
        ("data.classes=(big) cat,dog (small)", ("(big) cat", "dog (small)")),
        ("data.classes=[(big) cat, dog (small)]", ("(big) cat", "dog (small)")),
        ("data.classes=cat [1],[2]", ("cat [1]", "[2]")),
        ("data.classes=[]", ()),
        ("data.root=1", "1"),
        ("data.root=a=b", "a=b"),
        ("data.augment.scale=0.5,2", (0.5, 2.0)),
        ("data.augment.hflip=0", 0.0),
        ("data.augment.mosaic=0.5", 0.5),
        ("data.augment.hsv=0.015,0.7,0.4", (0.015, 0.7, 0.4)),
        ("optim.optimizer=adamw", "adamw"),
    ],
)
def test_override_reads_text_by_the_type_of_the_field(assignment, value):
    path = assignment.partition("=")[0].strip().split(".")
    result = override(Experiment(), [assignment])
    for name in path:
        result = getattr(result, name)
    assert result == value
    assert type(result) is type(value)
    if isinstance(value, tuple):
        assert [type(v) for v in result] == [type(v) for v in value]


def test_override_changes_that_field_only_and_the_last_one_wins():
    changed = override(Experiment(), ["train.epochs=3", "data.augment.hue=0.1", "train.epochs=5"])
    expected = experiment_to_dict(Experiment())
    expected["train"]["epochs"] = 5
    expected["data"]["augment"]["hue"] = 0.1
    assert experiment_to_dict(changed) == expected


@pytest.mark.parametrize(
    ("assignment", "right"),
    [
        ("train.epoch=3", "train.epochs"),
        ("trian.epochs=3", "train.epochs"),
        ("trian.epoch=3", "train.epochs"),
        ("epochs=3", "train.epochs"),
        ("train.lr=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("optm.lr=1", "optim.lr"),
        ("model.image_size=3", "data.image_size"),
        ("augment.scale=1,2", "data.augment.scale"),
        ("data.augmnt.scale=1,2", "data.augment.scale"),
        ("data.augment.hflp=1", "data.augment.hflip"),
        ("data.hflip=1", "data.augment.hflip"),
        ("trian=3", "train"),
    ],
)
def test_wrong_name_is_refused_with_the_nearest_right_one(assignment, right):
    with pytest.raises(ConfigError) as error:
        override(Experiment(), [assignment])
    message = str(error.value)
    assert message.startswith(f"--set {assignment.partition('=')[0]}: ")
    assert f"; did you mean {right}? (it has " in message
    assert "\n" not in message


def leaves(cls=Experiment, prefix=""):
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_letter_left_out_anywhere_is_put_right():
    for path in (p for p in leaves() if "." in p and len(p.split(".")[-1]) > 3):
        *groups, leaf = path.split(".")
        for wrong in (".".join([*groups, leaf[0] + leaf[2:]]), path[0] + path[2:]):
            with pytest.raises(ConfigError) as error:
                override(Experiment(), [f"{wrong}=1"])
            assert f"did you mean {path}?" in str(error.value)


def test_hopeless_name_gets_the_list_and_no_guess():
    with pytest.raises(ConfigError, match=r"no field 'qqq' \(it has name, model, data") as error:
        override(Experiment(), ["qqq=1"])
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs", "write it as name=value"),
        ("=3", "write it as name=value"),
        ("train=3", "train is a group; set one of its fields: epochs, batch_size"),
        ("train.epochs.x=3", "train.epochs has no fields"),
        ("train.epochs=x", "train.epochs='x': must be a whole number, at least 1"),
        ("train.epochs=1.5", "train.epochs=1.5: must be a whole number"),
        ("train.epochs=True", "train.epochs=True: must be a whole number"),
        ("train.epochs=", "train.epochs='': must be a whole number"),
        ("train.epochs=0", "train.epochs=0: must be a whole number, at least 1"),
        ("data.keep_ratio=maybe", "'maybe': must be true or false"),
        ("data.keep_ratio=2", "'2': must be true or false"),
        ("optim.lr=fast", "'fast': must be a finite number, greater than 0"),
        ("optim.lr=True", "True: must be a finite number"),
        ("optim.lr=nan", "'nan': must be a finite number"),
        ("optim.lr=1e999", "inf: must be a finite number"),
        (f"optim.lr=1{'0' * 400}", "must be a finite number"),
        ("optim.lr=1/0", "'1/0': must be a finite number"),
        ("optim.lr=.../1", "must be a finite number"),
        ("optim.lr=-1", "-1: must be a finite number, greater than 0"),
        ("optim.lr=0", "0: must be a finite number, greater than 0"),
        ("model.dilations=2,x", "(2, 'x'): must be whole numbers, each at least 1"),
        ("model.dilations=2,0", "(2, 0): must be whole numbers, each at least 1"),
        ("model.anchor_scales=", "must have at least one item"),
        ("data.augment.scale=1", "(1,): must be 2 finite numbers, each greater than 0"),
        ("data.augment.scale=1,2,3", "(1, 2, 3): must be 2 finite numbers"),
        ("data.augment.scale=0,1", "must be 2 finite numbers, each greater than 0"),
        ("data.augment.scale=2,1", "(2.0, 1.0): the smaller factor comes first"),
        ("data.augment.zoom=2,1", "the smaller factor comes first"),
        ("data.augment.multiscale=2,1", "the smaller factor comes first"),
        ("data.augment.hue=0.6", "0.6: must be a finite number, from 0 to 0.5"),
        ("data.augment.mixup=-0.1", "from 0 to 1"),
        ("data.image_size=16", "must be a whole number, at least 32"),
        ("data.cache_mb=-1", "must be a whole number, at least 0"),
        ("data.classes=cat,dog,cat", "each name must be another one, and none empty"),
        ("data.classes=cat,,dog", "each name must be another one, and none empty"),
        ("data.classes=a b,a  b", "each name must be another one, and none empty"),
        ("name=/tmp/x", "name='/tmp/x': must be the name of a folder, without slashes"),
        ("name=..", "must be the name of a folder"),
        ("train.seed=1180591620717411303424", "must be a whole number, from 0 to 1e+09"),
        ("optim.optimizer=adam", "'adam': must be one of sgd, adamw; did you mean adamw?"),
        ("model.feature=P3", "must be one of C5, DC5, C4, P4"),
    ],
)
def test_wrong_value_is_refused_and_named(assignment, message):
    with pytest.raises(ConfigError) as error:
        override(Experiment(), [assignment])
    assert message in str(error.value)
    assert str(error.value).removeprefix("--set ").startswith(assignment.partition("=")[0])
    assert "\n" not in str(error.value)


def numbers_of(kind, metadata):
    """Numbers within a field's bounds."""
    low, high, above = (metadata[name] for name in ("at_least", "at_most", "above"))
    low, open_end = max(low, above), above > low
    if kind is int:
        low, high = (None if abs(end) == math.inf else end for end in (low, high))
        return st.integers(low, high)
    return st.floats(
        None if low == -math.inf else low,
        None if high == math.inf else high,
        exclude_min=open_end,
        allow_nan=False,
        allow_infinity=False,
    )


def values(hint, metadata=None):
    """Any allowed value of a field's declared type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        fields = {f.name: values(hints[f.name], f.metadata) for f in dataclasses.fields(hint)}
        for field in dataclasses.fields(hint):
            rule = field.metadata.get("rule")
            if rule is ASCENDING:
                fields[field.name] = fields[field.name].map(sorted).map(tuple)
            elif rule:
                fields[field.name] = fields[field.name].filter(rule.holds)
        return st.builds(hint, **fields)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and Ellipsis in args:
        return st.lists(values(args[0], metadata), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(arg, metadata) for arg in args))
    if hint in (int, float):
        return numbers_of(hint, metadata)
    return {bool: st.booleans(), str: st.text()}[hint]


@settings(max_examples=50, deadline=None)
@given(values(Experiment))
def test_any_experiment_survives_json(experiment):
    text = json.dumps(experiment_to_dict(experiment), allow_nan=False)
    assert experiment_from_dict(json.loads(text)) == experiment


@settings(max_examples=15, deadline=None)
@given(values(Experiment))
def test_any_experiment_survives_overrides(experiment):
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    apart = ["name", "data.root", "data.classes"]
    apart += ["data.short_side", "data.augment.max_shift", "optim.milestones", "optim.gamma"]
    numbers = [path for path in leaves() if path not in apart]  # some have no effect beside others
    numbers = [p for p in numbers if not isinstance(value_of(experiment, p), str)]
    changed = override(Experiment(), [f"{p}={text(value_of(experiment, p))}" for p in numbers])
    assert all(value_of(changed, p) == value_of(experiment, p) for p in numbers)


def value_of(experiment, path):
    return functools.reduce(getattr, path.split("."), experiment)


def test_fields_left_out_of_a_dict_keep_their_defaults():
    assert experiment_from_dict({}) == Experiment()
    partly = experiment_from_dict({"data": {"augment": {"hue": 0.5}}})
    assert partly.data.augment == Augment(hue=0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trian": {}}, "no field 'trian'; did you mean train?"),
        ({"train": {"epoch": 3}}, "did you mean train.epochs?"),
        ({"train": {"epochs": "3"}}, "train.epochs='3': must be a whole number"),
        ({"train": 3}, "train: 3 is not a group of fields"),
        ([], r"experiment: \[\] is not a group"),
        ({"model": {"dilations": 2}}, "model.dilations=2: must be whole numbers"),
        ({"model": {"dilations": ["a"]}}, r"model.dilations=\['a'\]: must be whole numbers"),
        ({"optim": {"lr": float("nan")}}, "optim.lr=nan: must be a finite number"),
    ],
)
def test_bad_dict_is_refused_by_path(content, message):
    with pytest.raises(ConfigError, match=message):
        experiment_from_dict(content)


BASE = """
from tinydet.config import Experiment, Train
experiment = Experiment(train=Train(epochs=7))
"""
VARIANT = """
import dataclasses
from base_for_test import experiment
experiment = dataclasses.replace(experiment, name="wide")
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_file_is_loaded_named_and_overridden(tmp_path):
    file = write(tmp_path / "mine.py", BASE)
    assert load_experiment(file).name == "mine"
    assert load_experiment(str(file)).train.epochs == 7
    assert load_experiment(file, ["train.epochs=2", "name=other"]).name == "other"


def test_an_empty_name_is_the_file_s(tmp_path):
    (tmp_path / "tiny.py").write_text(BASE)
    assert load_experiment(tmp_path / "tiny.py", ["name="]).name == "tiny"


def test_variant_imports_the_file_beside_it(tmp_path):
    for folder, epochs in (("a", 7), ("b", 9)):
        write(tmp_path / folder / "base_for_test.py", BASE.replace("7", str(epochs)))
        write(tmp_path / folder / "variant.py", VARIANT)
    path_before = list(sys.path)
    # Two folders with files of the same name: each variant gets its own.
    assert load_experiment(tmp_path / "a" / "variant.py").train.epochs == 7
    loaded = load_experiment(tmp_path / "b" / "variant.py")
    assert (loaded.train.epochs, loaded.name) == (9, "wide")
    assert sys.path == path_before
    assert "base_for_test" not in sys.modules


def test_variant_imports_the_file_beside_it_whatever_else_has_its_name(tmp_path, monkeypatch):
    other = types.ModuleType("base_for_test")
    monkeypatch.setitem(sys.modules, "base_for_test", other)
    write(tmp_path / "base_for_test.py", BASE)
    assert load_experiment(write(tmp_path / "variant.py", VARIANT)).train.epochs == 7
    assert sys.modules["base_for_test"] is other


@pytest.mark.parametrize("name", ["tinydet", "timm", "copy"])
def test_file_with_the_name_of_a_library_does_not_replace_it(tmp_path, name):
    text = "import copy, timm\n" + BASE + "assert copy.copy and timm.create_model"
    assert load_experiment(write(tmp_path / f"{name}.py", text)).train.epochs == 7


def test_class_of_an_experiment_file_can_be_pickled(tmp_path):
    file = write(tmp_path / "mine.py", BASE + "class Own: pass")
    before = set(sys.modules)
    load_experiment(file)
    (module,) = (sys.modules[name] for name in set(sys.modules) - before if name[:5] == "mine_")
    assert type(pickle.loads(pickle.dumps(module.Own()))) is module.Own


def test_run_of_the_written_json_is_the_same_experiment(tmp_path):
    experiment = load_experiment(write(tmp_path / "mine.py", BASE), ["optim.lr=0.1"])
    written = write(
        tmp_path / "run" / "experiment.json", json.dumps(experiment_to_dict(experiment))
    )
    assert load_experiment(written) == experiment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must end with `experiment = Experiment"),
        ("experiment = 3", "must end with `experiment = Experiment"),
        ("experiment = (", "SyntaxError"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named"),
        ("from tinydet.config import Experiment\nexperiment = Experiment(epochs=3)", "TypeError"),
        (
            "from tinydet.config import *\nexperiment = Experiment(train=Train(epochs='3'))",
            "^train.epochs='3': must be a whole number",
        ),
    ],
)
def test_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(tmp_path / "mine.py", text))


def test_missing_file_is_refused_with_the_nearest_name(tmp_path):
    file = write(tmp_path / "rexnet_yolof.py", BASE)
    with pytest.raises(
        ConfigError, match=r"no such experiment file; did you mean .*rexnet_yolof\.py"
    ):
        load_experiment(tmp_path / "rexnet_yolo.py")
    with pytest.raises(ConfigError, match=r"no such experiment file$"):
        load_experiment(file.parent / "nowhere" / "a.py")


def test_broken_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"experiment\.json: not JSON"):
        load_experiment(write(tmp_path / "experiment.json", "{"))


def test_unknown_backbone_is_refused_with_the_nearest_names(tmp_path):
    file = write(tmp_path / "mine.py", BASE)
    with pytest.raises(ConfigError, match=r"model\.backbone=resnet81: .*did you mean .*resnet18"):
        load_experiment(file, ["model.backbone=resnet81"])
    # A tag of weights, and a model that timm has from us.
    for name in ("resnet18.a1_in1k", "shufflenetv2_x0_5"):
        assert load_experiment(file, [f"model.backbone={name}"]).model.backbone == name


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_load_experiment__json_in_unicode_of_any_kind(tmp_path, encoding):
    path = tmp_path / "experiment.json"
    written = experiment_to_dict(Experiment(name="猫"))
    path.write_bytes(json.dumps(written, ensure_ascii=False).encode(encoding))
    assert load_experiment(path).name == "猫"


def test_load_experiment__json_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "experiment.json"
    path.write_bytes('{"name":\n"é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"experiment\.json: line 2 is not UTF-8 .*save"):
        load_experiment(path)
