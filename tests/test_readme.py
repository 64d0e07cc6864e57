"""The README is the contract: each of its commands is one that its script takes."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from tinydet.experiment_file import load_experiment

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_OURS = {"pip install -e .[all]", "python -m venv .venv", ". .venv/bin/activate"}
NOT_OURS |= {"python -m pytest"}


def commands(text):
    """Return the commands of all shell blocks, as lists of words."""
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    parts = (part for line in lines.splitlines() for part in line.split(" && "))
    split = (shlex.split(part, comments=True) for part in parts)
    return [words for words in split if words and " ".join(words) not in NOT_OURS]


def chapter(title):
    return re.search(rf"^## {title}.*?(?=^## )", README, re.DOTALL | re.MULTILINE)[0]


def test_every_command_was_found():
    assert len(commands(README)) > 20
    assert not [words for words in commands(README) if words[0] not in ("python", "bash")]


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_script_takes_the_command(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, script, *arguments = words
    assert Path(script).is_file()
    if program == "bash":
        return
    args = runpy.run_path(script)["_parser"]().parse_args(arguments)
    experiments = [
        *vars(args).get("ideas", []),
        vars(args).get("base"),
        vars(args).get("experiment"),
    ]
    for experiment in filter(None, experiments):
        load_experiment(experiment, getattr(args, "set", ()))


def test_the_tour_is_a_script():
    scripts = {words[1] for words in commands(chapter("The tour"))}
    run = (ROOT / "tools" / "tour.sh").read_text()
    # These two need the network, or several processes; they have tests of their own.
    left_out = {"tools/download_voc07.sh", "tools/dist_train.sh"}
    assert {script for script in scripts if script not in run} == left_out


def test_files_named_are_there():
    named = set(re.findall(r"`((?:experiments|tools|deploy|tests|tinydet)/[\w/.]+\.\w+)`", README))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
