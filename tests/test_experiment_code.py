"""Whatever can change what is trained without changing a field is code."""

from pathlib import Path

import pytest

from tinydet.experiment_code import experiment_code, is_run_of
from tinydet.training.results import write_json

_DATA = "from tinydet.config import Experiment\nexperiment: Experiment = Experiment()\n"
_LAYER = "class Layer:\n    slope = {}\n"


def _write(folder, **texts):
    for name, text in texts.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / f"{next(iter(texts))}.py"


def test_data_alone_is_no_code_whatever_its_text(tmp_path):
    base = _write(tmp_path, base=_DATA)
    idea = _write(
        tmp_path,
        idea='"""An idea."""\nfrom dataclasses import replace\nfrom base import experiment\n'
        "lr = 0.1  # large\nexperiment = replace(experiment, name=str(lr))\n",
    )
    assert experiment_code(base) == experiment_code(idea) == ""
    assert experiment_code(tmp_path / "experiment.json") == ""
    for file in sorted(Path("experiments").glob("*.py")):
        assert bool(experiment_code(file)) == (file.stem == "quickstart_leak")


@pytest.mark.parametrize(
    "line",
    [
        "def f(): pass",
        "f = lambda x: x",
        "import torch; torch.nn.ReLU.inplace = True",
        "print(1)",
        "if True: f = 1",
        "class Layer: pass",
    ],
)
def test_what_a_file_does_beside_fields_is_code(tmp_path, line):
    assert experiment_code(_write(tmp_path, idea=f"{_DATA}{line}\n"))


def test_code_is_that_of_all_local_files_by_whatever_name(tmp_path, monkeypatch):
    idea = _write(tmp_path, idea=_LAYER.format(1) + _DATA)
    first = experiment_code(idea)
    copy = _write(tmp_path, copy=_LAYER.format(1) + _DATA)
    assert experiment_code(copy) == first
    _write(tmp_path, idea=_LAYER.format(2) + _DATA)
    assert experiment_code(idea) not in ("", first)

    # Beside it, imported by an import, in a package, and found by Python elsewhere.
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.syspath_prepend(str(elsewhere))
    _write(tmp_path / "package", __init__="", part="from far_away import Layer\n")
    files = {
        tmp_path / "middle.py": "import near\nimport package.part\n",
        tmp_path / "near.py": _LAYER.format(1),
        tmp_path / "package" / "other.py": _LAYER.format(2),
        elsewhere / "far_away.py": _LAYER.format(3),
    }
    elsewhere.mkdir()
    for path, text in files.items():
        path.write_text(text)
    user = _write(tmp_path, user="import middle\nimport torch\n" + _DATA)
    before = experiment_code(user)
    for path, text in list(files.items())[1:]:
        path.write_text(text + "# changed\n")
        assert experiment_code(user) != before
        path.write_text(text)
    assert experiment_code(user) == before


def test_a_run_is_of_the_code_that_all_its_sessions_had(tmp_path):
    assert is_run_of(tmp_path, "")
    assert not is_run_of(tmp_path, "a")
    for codes, expected in (("a", True), ("aa", True), ("ab", False), ("", False)):
        sessions = [{"command": "", "code": code} for code in codes] or [{"command": ""}]
        write_json(tmp_path / "sessions.json", sessions)
        assert is_run_of(tmp_path, "a") == expected
    assert is_run_of(tmp_path, "")
