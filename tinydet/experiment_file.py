"""An experiment is plain Python: load it from a file, change fields by path, keep it as JSON.

A variant imports another file's `experiment` (files in the same folder import each other by name)
and uses `dataclasses.replace`. `--set a.b=c` changes one field.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tinydet.checked import field_types
from tinydet.config import ConfigError, Experiment
from tinydet.text import read_text

# Fields that have no effect while another field has a value.
_USELESS_BESIDE: dict[str, tuple[str, Any]] = {
    "model.attention_place": ("model.attention", "none"),
    "data.short_side": ("data.keep_ratio", False),
    "data.augment.max_shift": ("data.augment.shift", 0.0),
    "optim.milestones": ("optim.schedule", "cosine"),
    "optim.gamma": ("optim.schedule", "cosine"),
}


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
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
    experiment = override(experiment, overrides)
    if not experiment.name:
        experiment = dataclasses.replace(experiment, name=path.stem)

    # Imported late, as it takes seconds: the errors above appear at once.
    from tinydet.backbones.factory import check_backbone

    check_backbone(experiment.model.backbone)
    return experiment


def _files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*.py"))


def _run_file(path: Path) -> Experiment:
    try:
        with _importable(path.resolve().parent):
            module = _execute(path.resolve())
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{path}: must end with `experiment = Experiment(...)`")
    return experiment


def _execute(path: Path) -> ModuleType:
    """Run a file as a module, named by its path: files of one name do not stand for each other."""
    name = f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, timm's registry and pickle look it up
    spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the files of a folder be imported by name within this block, and only there."""
    names = {file.stem for file in _files(folder) if not _is_library(file.stem)}
    hidden = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def _is_library(name: str) -> bool:
    return name in sys.stdlib_module_names or hasattr(sys.modules.get(name), "__path__")


def override(experiment: Experiment, assignments: Sequence[str]) -> Experiment:
    """Return the experiment with "a.b=value" assignments applied in order.

    Values are read by the field's declared type: `train.epochs=3`, `data.keep_ratio=false`,
    `model.dilations=2,4,6,8`, `data.classes=cat,dog`.

    Raises:
        ConfigError: an unknown name (the message suggests the nearest one), a value that is not
            allowed, or one that has no effect beside another field. What a file inherits may have
            none: it may matter to the files that derive from it.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {assignment}: write it as name=value, e.g. train.epochs=3")
        experiment = _replace_path(experiment, name.strip().split("."), text.strip(), name.strip())
    for assignment in assignments:
        name = assignment.partition("=")[0].strip()
        other, useless = _USELESS_BESIDE.get(name, ("", None))
        if (
            useless is not None
            and functools.reduce(getattr, other.split("."), experiment) == useless
        ):
            shown = str(useless).lower() if isinstance(useless, bool) else useless
            raise ConfigError(f"--set {assignment}: has no effect beside {other}={shown}")
    return experiment


def _replace_path(node: Any, path: list[str], text: str, full: str) -> Any:
    name, *rest = path
    hints = field_types(type(node))
    if name not in hints:
        prefix = full[: len(full) - len(".".join(path))]
        raise ConfigError(f"--set {full}: {_unknown(name, full, prefix, type(node))}")
    nested = dataclasses.is_dataclass(hints[name])
    if rest and not nested:
        raise ConfigError(f"--set {full}: {'.'.join(full.split('.')[: -len(rest)])} has no fields")
    if not rest and nested:
        inner = ", ".join(field_types(hints[name]))
        raise ConfigError(f"--set {full}: {name} is a group; set one of its fields: {inner}")
    if rest:
        value = _replace_path(getattr(node, name), rest, text, full)
    else:
        value = _parse_text(text, hints[name])
    return dataclasses.replace(node, **{name: value})


def _unknown(name: str, full: str, prefix: str, owner: type) -> str:
    """Say that `owner` has no `name`, and what the path `prefix` + `name` + rest may have meant."""
    names, paths = list(field_types(owner)), _all_paths(Experiment)
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


def _all_paths(cls: Any, prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, hint in field_types(cls).items():
        paths += _all_paths(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else []
        paths += [] if dataclasses.is_dataclass(hint) else [prefix + name]
    return paths


def _parse_text(text: str, hint: Any) -> Any:
    """Return the Python value that command-line text spells; the experiment checks it."""
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    if hint is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            text.lower(), text
        )
    if typing.get_origin(hint) is tuple:
        items = _without_brackets(text).strip(", ")
        item = typing.get_args(hint)[0]
        return tuple(_parse_text(t.strip(" '\""), item) for t in items.split(",")) if items else ()
    fraction = re.fullmatch(r"(\d+\.?\d*)/(\d+\.?\d*)", text)
    if fraction and hint is float and float(fraction[2]):
        return float(fraction[1]) / float(fraction[2])
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _without_brackets(text: str) -> str:
    """Return a list's items without the brackets around all of them; a name may have its own."""
    for opening, closing in ("()", "[]"):
        inner = text[1:-1]
        is_pair = text.startswith(opening) and text.endswith(closing)
        # "(a) b, (c)": the last one is not the counterpart of the first.
        if is_pair and not inner.find(closing) < inner.find(opening):
            return inner
    return text


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as nested dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def experiment_from_dict(values: dict[str, Any]) -> Experiment:
    """Build an experiment from nested dicts; fields left out keep their defaults.

    Raises:
        ConfigError: an unknown name, or a value that is not allowed.
    """
    return _from_dict(Experiment, values, "")


def _from_dict(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'experiment'}: {values!r} is not a group of fields"
        )
    types = field_types(cls)
    fields = {}
    for name, value in values.items():
        if name not in types:
            raise ConfigError(_unknown(name, prefix + name, prefix, cls))
        is_group = dataclasses.is_dataclass(types[name])
        fields[name] = _from_dict(types[name], value, f"{prefix}{name}.") if is_group else value
    return cls(**fields)
