"""An experiment is plain Python: load it from a file, change fields by path, keep it as JSON.

A variant imports another file's `experiment` (files in the same folder import each other by name)
and uses `dataclasses.replace`. `--set a.b=c` changes one field.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import re
import runpy
import sys
import typing
from pathlib import Path
from typing import Any, Literal

from tinydet.config import ConfigError, Experiment
from tinydet.text import read_text

_TINY = 1e-12  # of a quantity that has to be positive
_ANY = math.inf
# Smallest and largest value of each number; of every item of a tuple.
_BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "model": {
        "freeze_stages": (0, 5),
        "encoder_channels": (1, _ANY),
        "encoder_mid_channels": (1, _ANY),
        "dilations": (1, _ANY),
        "cls_convs": (0, _ANY),
        "reg_convs": (0, _ANY),
        "anchor_scales": (_TINY, _ANY),
        "match_topk": (1, _ANY),
        "match_pos_ignore": (0, 1),
        "match_neg_ignore": (0, 1),
        "center_clamp": (0, _ANY),
        "score_threshold": (0, 1),
        "nms_iou": (0, 1),
        "candidates": (1, _ANY),
        "max_detections": (1, _ANY),
    },
    "data": {
        "image_size": (32, _ANY),
        "short_side": (0, _ANY),
        "workers": (-1, _ANY),
        "cache_mb": (0, _ANY),
    },
    "data.augment": {
        "color_jitter": (0, _ANY),
        "hue": (0, 0.5),
        "scale": (_TINY, _ANY),
        "hflip": (0, 1),
        "vflip": (0, 1),
        "shift": (0, 1),
        "max_shift": (0, _ANY),
        "multiscale": (_TINY, _ANY),
        "hsv": (0, 1),
        "mosaic": (0, 1),
        "mixup": (0, 1),
        "rotate": (0, 180),
        "shear": (0, 60),
        "translate": (0, 1),
        "zoom": (_TINY, _ANY),
        "plain_epochs": (0, _ANY),
    },
    "optim": {
        "lr": (_TINY, _ANY),
        "backbone_lr_factor": (0, _ANY),
        "momentum": (0, 0.9999),
        "weight_decay": (0, _ANY),
        "milestones": (0, 1),
        "gamma": (0, 1),
        "warmup_iters": (0, _ANY),
        "warmup_factor": (0, 1),
        "clip_norm": (0, _ANY),
        "base_batch": (1, _ANY),
    },
    "train": {
        "epochs": (1, _ANY),
        "batch_size": (1, _ANY),
        "accumulate": (1, _ANY),
        "ema_decay": (0, 0.999999),
        "eval_every": (1, _ANY),
        "save_minutes": (0, _ANY),
        "keep_every": (0, _ANY),
        "max_bad_steps": (1, _ANY),
        "eval_batch_size": (1, _ANY),
    },
}


def load_experiment(path: str | Path, overrides: typing.Sequence[str] = ()) -> Experiment:
    """Load an experiment from a Python file that defines `experiment`, or a run's experiment.json.

    Args:
        path: the file. A Python file is executed; files beside it can be imported by name.
        overrides: strings like "train.epochs=3".

    Raises:
        ConfigError: the file is missing or defines no experiment, an override is wrong, or there is
            no such backbone.
    """
    path = Path(path)
    if not path.is_file():
        files = {p.stem: p for folder in ("experiments", path.parent) for p in _files(folder)}
        near = difflib.get_close_matches(path.stem, files, 1)
        hint = f"; did you mean {files[near[0]]}?" if near else ""
        raise ConfigError(f"{path}: no such experiment file{hint}")
    if path.suffix not in (".py", ".json"):
        raise ConfigError(
            f"{path}: an experiment is a .py or .json file; checkpoints come after the experiment"
        )
    if path.suffix == ".json":
        try:
            values = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON: {error}") from None
        experiment = experiment_from_dict(values)
    else:
        experiment = _run_file(path)
    if not experiment.name:
        experiment = dataclasses.replace(experiment, name=path.stem)
    experiment = override(experiment, overrides)
    _check_ranges(experiment)

    # Here, as it takes seconds to import: the mistakes above are told at once.
    from tinydet.backbones.factory import check_backbone

    check_backbone(experiment.model.backbone)
    return experiment


def _files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*.py"))


def _run_file(path: Path) -> Experiment:
    before = set(sys.modules)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        namespace = runpy.run_path(str(path))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
        # Two folders may hold files of one name: do not let one stand in for the other later.
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and str(Path(file).parent) == folder:
                del sys.modules[name]
    experiment = namespace.get("experiment")
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{path}: must end with `experiment = Experiment(...)`")
    # Type-check what the file built: dataclasses do not.
    return experiment_from_dict(dataclasses.asdict(experiment))


def _check_ranges(experiment: Experiment) -> None:
    """Refuse a value of the right type that means nothing."""
    for group, bounds in _BOUNDS.items():
        fields = experiment
        for name in group.split("."):
            fields = getattr(fields, name)
        for name, (low, high) in bounds.items():
            value = getattr(fields, name)
            values = value if isinstance(value, tuple) else (value,)
            if not all(low <= v <= high for v in values):
                rule = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise ConfigError(f"{group}.{name}={value!r}: must be {rule}")
    for name in ("scale", "multiscale", "zoom"):
        low, high = getattr(experiment.data.augment, name)
        if low > high:
            raise ConfigError(f"data.augment.{name}={low:g},{high:g}: the smaller factor is first")
    if not experiment.model.anchor_scales:
        raise ConfigError("model.anchor_scales: needs at least one")


def override(experiment: Experiment, assignments: typing.Sequence[str]) -> Experiment:
    """Return the experiment with "a.b=value" assignments applied in order.

    Values are read by the field's declared type: `train.epochs=3`, `data.keep_ratio=false`,
    `model.dilations=2,4,6,8`, `data.classes=cat,dog`.

    Raises:
        ConfigError: an unknown name (the nearest right one is given) or a value of the wrong type.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {assignment}: write it as name=value, e.g. train.epochs=3")
        experiment = _replace_path(experiment, name.strip().split("."), text.strip(), name.strip())
    return experiment


def _replace_path(node: Any, path: list[str], text: str, full: str) -> Any:
    name, *rest = path
    hints = typing.get_type_hints(type(node))
    if name not in hints:
        prefix = full[: len(full) - len(".".join(path))]
        raise ConfigError(f"--set {full}: {_unknown(name, full, prefix, type(node))}")
    nested = dataclasses.is_dataclass(hints[name])
    if rest and not nested:
        raise ConfigError(f"--set {full}: {'.'.join(full.split('.')[: -len(rest)])} has no fields")
    if not rest and nested:
        inner = ", ".join(typing.get_type_hints(hints[name]))
        raise ConfigError(f"--set {full}: {name} is a group; set one of its fields: {inner}")
    if rest:
        value = _replace_path(getattr(node, name), rest, text, full)
    else:
        value = _convert(_parse_text(text, hints[name]), hints[name], f"--set {full}={text}")
    return dataclasses.replace(node, **{name: value})


def _unknown(name: str, full: str, prefix: str, owner: type) -> str:
    """Say that `owner` has no `name`, and what the path `prefix` + `name` + rest may have meant."""
    names, paths = list(typing.get_type_hints(owner)), _all_paths(Experiment)
    # A right name under the wrong group is as common as a typo.
    elsewhere = [p for p in paths if p.split(".")[-1] == full.split(".")[-1]]
    near = difflib.get_close_matches(full, elsewhere, 1, 0)
    rest = full[len(prefix) + len(name) :]
    for corrected in difflib.get_close_matches(name, names, 1):
        path = prefix + corrected + rest
        groups_and_fields = [p for p in paths if f"{p}.".startswith(f"{path}.")]
        near = near or ([path] if groups_and_fields else difflib.get_close_matches(path, paths, 1))
    near = near or difflib.get_close_matches(full, paths, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{owner.__name__} has no field {name!r}{hint} (it has {', '.join(names)})"


def _all_paths(cls: type, prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        paths += _all_paths(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else []
        paths += [] if dataclasses.is_dataclass(hint) else [prefix + name]
    return paths


def _parse_text(text: str, hint: Any) -> Any:
    """Read command-line text as the Python value it spells, leaving checks to `_convert`."""
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    if hint is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            text.lower(), text
        )
    if typing.get_origin(hint) is tuple:
        if not text.strip("()[] "):
            return ()
        item = typing.get_args(hint)[0]
        return tuple(_parse_text(t.strip(" '\""), item) for t in text.strip("()[], ").split(","))
    fraction = re.fullmatch(r"(\d+\.?\d*)/(\d+\.?\d*)", text)
    if fraction and hint is float and float(fraction[2]):
        return float(fraction[1]) / float(fraction[2])
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check a value against a declared type; ints become floats and lists tuples where declared."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in args], 1)
        hint_text = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}: must be one of {', '.join(map(str, args))}{hint_text}")
    if origin is tuple and isinstance(value, (list, tuple)):
        if Ellipsis not in args and len(value) != len(args):
            raise ConfigError(f"{where}: needs {len(args)} values, got {len(value)}")
        item_hints = [args[0]] * len(value) if Ellipsis in args else args
        return tuple(_convert(v, h, where) for v, h in zip(value, item_hints, strict=True))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    name = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    raise ConfigError(f"{where}: {value!r} is not of type {name}")


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as nested dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def experiment_from_dict(values: dict[str, Any]) -> Experiment:
    """Build an experiment from nested dicts; fields left out keep their defaults.

    Raises:
        ConfigError: an unknown name or a value of the wrong type.
    """
    return _from_dict(Experiment, values, "")


def _from_dict(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'experiment'}: {values!r} is not a group of fields"
        )
    hints = typing.get_type_hints(cls)
    converted = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(_unknown(name, prefix + name, prefix, cls))
        if dataclasses.is_dataclass(hints[name]):
            converted[name] = _from_dict(hints[name], value, f"{prefix}{name}.")
        else:
            converted[name] = _convert(value, hints[name], prefix + name)
    return cls(**converted)
