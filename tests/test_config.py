"""The fields of experiments: their defaults, checks and table."""

import dataclasses
import functools
import math
import pickle
import typing
from pathlib import Path

import pytest

from tinydet.checked import allowed, field_types
from tinydet.config import VOC_CLASSES, Augment, ConfigError, Data, Experiment, Model, Optim, Train
from tinydet.experiment_file import override
from tinydet.report.table import markdown_table


def test_values_given_in_python_are_checked_and_converted():
    with pytest.raises(ConfigError, match=r"^train.batch_size=-1: must be a whole number"):
        Train(batch_size=-1)
    with pytest.raises(ConfigError, match=r"^data.augment.hflip=True: must be a finite number"):
        dataclasses.replace(Experiment().data.augment, hflip=True)
    with pytest.raises(ConfigError, match=r"^model=3: must be of type Model"):
        Experiment(model=3)
    model = Model(dilations=[2, 4], center_clamp=8)
    assert (model.dilations, type(model.center_clamp)) == ((2, 4), float)


def test_experiments_are_values():
    experiment = override(Experiment(), ["train.epochs=3"])
    assert pickle.loads(pickle.dumps(experiment)) == experiment != Experiment()
    assert hash(experiment) == hash(override(Experiment(), ["train.epochs=3"]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.name = "other"


def test_defaults_are_yolof_as_published():
    model = Model()
    assert (model.match_topk, model.match_pos_ignore, model.match_neg_ignore) == (4, 0.15, 0.7)
    assert (model.center_clamp, model.dilations) == (32, (2, 4, 6, 8))
    assert (model.encoder_channels, model.encoder_mid_channels) == (512, 128)
    assert (model.cls_convs, model.reg_convs, model.anchor_scales) == (2, 4, (1, 2, 4, 8, 16))
    tested = (model.score_threshold, model.candidates, model.nms_iou, model.max_detections)
    assert tested == (0.05, 1000, 0.6, 100)


def test_every_number_has_bounds():
    for group in (Model, Augment, Data, Optim, Train):
        for field in dataclasses.fields(group):
            kinds = {float, int} & {field_types(group)[field.name], *item_types(group, field.name)}
            lows = [field.metadata.get(name, -math.inf) for name in ("at_least", "above")]
            bounded = max(lows) > -math.inf
            assert bounded == bool(kinds), field.name


def item_types(group, name):
    hint = field_types(group)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is tuple else ()


def test_table_of_fields_in_the_readme_is_up_to_date():
    readme = Path(__file__).parents[1] / "experiments" / "README.md"
    assert field_table() in readme.read_text(encoding="utf-8"), f"paste this:\n{field_table()}"


def field_table():
    rows = []
    for path in leaves():
        owner = value_of(Experiment(), path.rpartition(".")[0]) if "." in path else Experiment()
        field = next(f for f in dataclasses.fields(owner) if f.name == path.split(".")[-1])
        value = getattr(owner, field.name)
        default = ",".join(map(short, value)) if isinstance(value, tuple) else short(value)
        default = "VOC's 20" if value == VOC_CLASSES else default and f"`{default}`"
        rows.append([f"`{path}`", default, allowed(type(owner), field.name)])
        rows[-1].append(field.metadata["description"])
    return "\n".join(markdown_table(["Field", "Default", "Values", "Meaning"], rows))


def short(value):
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def leaves(cls=Experiment, prefix=""):
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def value_of(experiment, path):
    return functools.reduce(getattr, path.split("."), experiment)
