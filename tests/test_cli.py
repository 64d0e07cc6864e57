"""What tools print reaches an output of any encoding, and ends nothing."""

import argparse
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tinydet import cli
from tinydet.atomic import check_out
from tinydet.cli import add_predictor, given, load_predictor
from tinydet.config import Experiment

_ROOT = Path(__file__).resolve().parents[1]
_TOOL = """
import argparse, logging, sys
from rich.console import Console
from rich.progress import track
from tinydet.cli import run
def main(args):
    print("AP50 80.0 \\u00b1 0.3 \\u732b \\udcff")
    logging.info("logged \\u732b")
    Console().print("rich \\u732b")
    list(track([1], description="\\u732b"))
    print("end")
    if args.fail:
        raise ValueError("no \\u732b \\udcff")
parser = argparse.ArgumentParser()
parser.add_argument("--fail", action="store_true", help="\\u732b")
run(main, parser)
"""


def _run(encoding, *arguments):
    return subprocess.run(
        [sys.executable, "-c", _TOOL, *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_run__letters_that_the_output_cannot_take(encoding):
    done = _run(encoding)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    cat, bad = "猫".encode(encoding, "backslashreplace"), rb"\udcff"
    plus_minus = "±".encode(encoding, "backslashreplace")
    lines = done.stdout.splitlines()
    assert lines[0] == b" ".join([b"AP50 80.0", plus_minus, b"0.3", cat, bad])
    assert lines[1] == b"logged " + cat
    assert lines[2] == b"rich " + cat
    assert lines[-1] == b"end"


def test_run__help_and_mistakes_in_ascii():
    assert rb"\u732b" in _run("ascii", "--help").stdout
    done = _run("ascii", "--fail")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [rb"error: no \u732b \udcff"]


@pytest.mark.parametrize(
    "code",
    [
        "torch.empty(2**60, dtype=torch.uint8)",
        "numpy.empty(2**60, dtype=numpy.uint8)",
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')",
    ],
)
def test_run__full_memory_is_one_line_of_advice(code):
    tool = (
        "import argparse, numpy, torch\n"
        "from tinydet.cli import run\n"
        f"def main(args):\n    {code}\n"
        "run(main, argparse.ArgumentParser())"
    )
    done = subprocess.run([sys.executable, "-c", tool], cwd=_ROOT, capture_output=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: out of memory: use a smaller train.batch_size")


@pytest.mark.parametrize("end", ["print('end' * 9999)", "logging.info('end')"])
def test_run__a_reader_that_has_gone_is_no_error(end):
    tool = (
        "import argparse, logging, sys\n"
        "from tinydet.cli import run\n"
        "def main(args):\n"
        "    print('first', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    logging.info('second')\n"
        f"    {end}\n"
        "    print('went on', file=sys.stderr)\n"
        "run(main, argparse.ArgumentParser())"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", tool], cwd=_ROOT, **pipes)
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b"went on\n"
    assert process.wait() == 0


def test_run__printing_to_a_reader_that_has_gone_ends_the_command():
    tool = (
        "import argparse, sys\n"
        "from tinydet.cli import run\n"
        "def main(args):\n"
        "    sys.stdin.readline()\n"
        "    print('second', flush=True)\n"
        "run(main, argparse.ArgumentParser())"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", tool], cwd=_ROOT, **pipes)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_run__news_of_torch_stay_off_the_screen():
    code = (
        "import argparse, logging\n"
        "from tinydet.cli import run\n"
        "def main(args):\n"
        "    import torch\n"
        "    for part in ('_dynamo', '_inductor', 'utils.cpp_extension'):\n"
        "        logging.getLogger(f'torch.{part}').warning('news')\n"
        "        logging.getLogger(f'torch.{part}').error('trouble')\n"
        "run(main, argparse.ArgumentParser())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, check=True)
    assert b"news" not in done.stdout + done.stderr
    assert done.stderr.count(b"trouble") == 3


_SCRIPTS = {str(p.relative_to(_ROOT)) for d in ("tools", "deploy") for p in _ROOT.glob(f"{d}/*.py")}


@pytest.mark.parametrize("script", sorted(_SCRIPTS - {"tools/dist_launch.py"}))  # that is torchrun
def test_every_tool_runs_through_it(script, monkeypatch):
    called = []
    monkeypatch.setattr("tinydet.cli.run", lambda *given: called.append(given))
    runpy.run_path(str(_ROOT / script), run_name="__main__")
    assert len(called) == 1


class _Metrics:
    def lines(self):
        return ["猫 80.0"]

    def as_dict(self):
        return {"AP50": 0.8}


def test_numbers_are_written_before_they_are_printed(monkeypatch, tmp_path):
    main = runpy.run_path(str(_ROOT / "tools/test.py"))["main"]
    detector = argparse.Namespace(classes=("猫",))
    for name, value in {
        "tinydet.experiment_file.load_experiment": Experiment(),
        "tinydet.training.checkpoint.load_checkpoint": argparse.Namespace(detector=detector),
        "tinydet.data.dataset.load_split": None,
        "tinydet.training.evaluate.evaluate_detector": _Metrics(),
    }.items():
        monkeypatch.setattr(name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    out = tmp_path / "numbers.json"
    args = argparse.Namespace(
        experiment=None, checkpoint=Path("x.pt"), device="cpu", out=out, set=[], eval="mAP"
    )
    with pytest.raises(UnicodeEncodeError):
        main(args)
    assert "0.8" in out.read_text()


def test_given__leaves_defaults_to_the_function():
    args = argparse.Namespace(size=[64, 96], images=None, fuse=False, turns=0, other=1)
    options = given(args, "size", "images", "fuse", "turns")
    assert options == {"size": (64, 96), "fuse": False, "turns": 0}


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("image_demo", ["photo.jpg", "--score-threshold", "0.5", "best.pt"]),
        ("video_demo", ["--out", "o.mp4", "clip.mp4", "--batch-size", "2", "best.pt"]),
        ("speed", ["exp.py", "--batch-size", "4", "best.pt"]),
        ("test", ["exp.py", "--device", "cpu", "best.pt"]),
        ("compare", ["base.py", "--seeds", "2", "idea.py"]),
    ],
)
def test_files_may_follow_options(monkeypatch, tool, words):
    files = [word for word in words if "." in word and word[0] not in "0o"]
    module = runpy.run_path(str(_ROOT / "tools" / f"{tool}.py"))
    parsed = cli._parse  # argparse's own would exit with status 2
    monkeypatch.setattr(sys, "argv", ["tool", *words])
    args = vars(parsed(module["_parser"]()))
    found = [args[name] for name in args if name not in ("out", "set")]
    texts = [str(one) for value in found for one in (value if isinstance(value, list) else [value])]
    assert [text for text in texts if text in files] == files


def test_check_out__before_the_work(tmp_path):
    source = tmp_path / "best.pt"
    source.touch()
    (tmp_path / "link.onnx").symlink_to(source)
    check_out(None, [source])
    check_out(tmp_path / "new.onnx", [source, tmp_path / "gone.pt"], [".onnx"])
    for out, says in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "gone" / "a.onnx", "there is no folder"),
        (tmp_path / "link.onnx", "is .*best.pt itself"),
        (source, r"end the name in \.onnx"),
    ):
        with pytest.raises(ValueError, match=says):
            check_out(out, [source], [".onnx"])


@pytest.mark.parametrize(("own", "expected"), [(0.05, 0.3), (0.5, 0.5)])
def test_demos_draw_what_the_checkpoint_has_and_no_faint_scores(monkeypatch, own, expected):
    from tinydet.deployment import predictor

    class Stub:
        def __init__(self, *options):
            self.score_threshold = own if options[3] is None else options[3]

        def folded(self):
            return self

    monkeypatch.setattr(predictor, "Predictor", Stub)
    parser = argparse.ArgumentParser()
    add_predictor(parser)
    assert load_predictor(parser.parse_args(["a.onnx"]))[0].score_threshold == expected
    args = parser.parse_args(["a.onnx", "--score-threshold", "0.9"])
    assert load_predictor(args)[0].score_threshold == 0.9
