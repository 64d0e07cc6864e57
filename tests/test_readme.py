"""The pages are the contract: commands parse, links and files exist, the output shown is real."""

import functools
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from tinydet.experiment_file import load_experiment

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    page.relative_to(ROOT)
    for page in sorted(
        [ROOT / "README.md", *(ROOT / "tests" / "benchmarks").glob("*.md")]
        + [
            page
            for folder in ("tools", "deploy", "experiments", "tinydet", "tinydet/*")
            for page in ROOT.glob(f"{folder}/README.md")
        ]
    )
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS[Path("README.md")]
NOT_OURS = ("pip install", "python -m", ". .venv")
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text, *languages):
    """Return the contents of the fenced blocks in one of the languages."""
    return [content for language, content in CODE.findall(text) if language in languages]


def prose(text):
    return CODE.sub("", text)


def commands(text):
    """Return the commands of all shell blocks, as tuples of words."""
    lines = "\n".join(blocks(text, "bash"))
    for console in blocks(text, "console"):
        lines += "".join(f"\n{line[2:]}" for line in console.splitlines() if line[:2] == "$ ")
    parts = (
        part for line in lines.replace("\\\n", " ").splitlines() for part in line.split(" && ")
    )
    split = (shlex.split(part, comments=True) for part in parts if not part.startswith(NOT_OURS))
    return [tuple(expanded(without_variables(words))) for words in split if words]


def expanded(words):
    """Expand braces as a shell does: `a/{b,c}.py` is `a/b.py a/c.py`."""
    for word in words:
        before, choices, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", word).groups()
        yield from (before + choice + after for choice in (choices or "").split(","))


def without_variables(words):
    """Drop the NAME=VALUE in front of a command."""
    while "=" in words[0]:
        words = words[1:]
    return words


def inline_commands(text):
    """Return script and options of each command in the prose and tables: `python tools/...`."""
    for code in re.findall(r"`(python (?:tools|deploy|tests)/[^`]+)`", prose(text)):
        script, *rest = code.split()[1:]
        subcommand = rest[:1] if script == "tools/analyze_logs.py" else []
        yield script, subcommand, re.findall(r"--[a-z][a-z0-9-]*", " ".join(rest))


@functools.cache
def parser_of(script):
    """Return the script's parser, or None where it takes no arguments."""
    before = list(sys.path)
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        made = runpy.run_path(str(ROOT / script)).get("_parser")
    finally:
        sys.path[:] = before
    return made and made()


def options(parser, subcommand=()):
    for name in subcommand:
        choices = next(a.choices for a in parser._actions if isinstance(a.choices, dict))
        parser = choices[name]
    assert isinstance(parser, ArgumentParser)
    return {
        option for action in parser._actions for option in action.option_strings if len(option) > 2
    }


ALL_COMMANDS = list(dict.fromkeys(words for text in TEXTS.values() for words in commands(text)))


def test_every_command_was_found():
    assert len(commands(README)) >= 10
    assert len(ALL_COMMANDS) > len(set(commands(README)))
    assert not [
        words for words in ALL_COMMANDS if words[0] not in ("python", "bash", "tensorboard")
    ]


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_script_takes_the_command(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, script, *arguments = words
    assert Path(script).is_file()
    if program != "python" or (parser := parser_of(script)) is None:
        return
    args = parser.parse_args(arguments)
    experiments = [
        *vars(args).get("ideas", []),
        vars(args).get("base"),
        vars(args).get("experiment"),
    ]
    for experiment in filter(None, experiments):
        if not re.search("[A-Z]{4}", str(experiment)):  # EXPERIMENT and NAME stand for any
            load_experiment(experiment, getattr(args, "set", ()) or ())


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_script_takes_the_options_named_in_prose(page):
    for script, subcommand, named in inline_commands(TEXTS[page]):
        text = (ROOT / script).read_text(encoding="utf-8")
        parser = parser_of(script) if named else None
        there = options(parser, subcommand) if parser else set(re.findall(r"--[a-z0-9-]+", text))
        assert set(named) <= there, script


def test_the_table_of_commands_is_complete():
    page = TEXTS[Path("tools/README.md")]
    rows = re.findall(
        r"^\| `python ([^\s`]+)(?: (plot_curve|summary))?.*?` \| (.*?) \|", page, re.MULTILINE
    )
    scripts = {
        f"{folder}/{p.name}" for folder in ("tools", "deploy") for p in (ROOT / folder).glob("*.py")
    }
    assert {script for script, _, _ in rows} == scripts - {"tools/dist_launch.py"}
    for script, subcommand, named in rows:
        there = options(parser_of(script), [subcommand] if subcommand else [])
        assert set(re.findall(r"`(--[a-z0-9-]+)`", named)) == there - {"--help", "--debug"}, script


def test_the_tour_is_a_script():
    scripts = {words[1] for words in commands(README)}
    run = (ROOT / "tools" / "tour.sh").read_text()
    # These need the network, several processes, or the quickstart's minutes.
    left_out = {"tools/download_voc07.sh", "tools/dist_train.sh", "tools/quickstart.sh"}
    assert {script for script in scripts if script not in run} == left_out


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_named_are_there(page):
    folders = "experiments|tools|deploy|tests|tinydet"
    named = set(re.findall(rf"`((?:{folders})/[\w/.]+\.\w+)`", TEXTS[page]))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(TEXTS[page])):
        if target.startswith("https://"):
            continue
        file, _, anchor = unquote(target).partition("#")
        path = (ROOT / page.parent / file).resolve() if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text):
    """Return the names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 200


def test_the_idea_shown_is_the_file():
    block = next(block for block in blocks(README, "python") if "class Leak" in block)
    lines = iter((ROOT / "experiments" / "quickstart_leak.py").read_text().splitlines())
    assert all(line in lines for line in block.splitlines() if line)  # all there, in this order


@pytest.mark.slow
def test_the_fold_shown_prints_what_is_shown(capsys):
    code = next(block for block in blocks(README, "python") if "import expand, fold" in block)
    shown = [line[2:] for line in code.splitlines() if line.startswith("# ")]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(shown) > 5
    assert printed[:-1] == shown[:-1]
    # The digits of the difference are the machine's.
    number = re.compile(r"\d\.\de-\d\d")
    assert number.sub("", printed[-1]) == number.sub("", shown[-1])
    assert float(number.search(printed[-1])[0]) < 1e-13
