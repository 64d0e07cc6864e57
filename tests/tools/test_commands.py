"""The command lines as a user types them: help, mistakes, and the whole path once."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinydet.comparison import plan
from tinydet.data.shapes import render_shapes
from tinydet.report.video import VideoFile, open_video
from tinydet.training import loop
from tinydet.training.profile import StepTime

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tools", "deploy")
    for path in ROOT.glob(f"{folder}/*.py")
    if "ArgumentParser" in path.read_text()
)
EXPERIMENT = str(ROOT / "experiments" / "rexnet_yolof.py")
_TINY = """
from tinydet.config import Data, Experiment, Model, Train
experiment = Experiment(
    model=Model(backbone="test_resnet", weights="random", encoder_channels=16,
                encoder_mid_channels=8, dilations=(2,), cls_convs=1, reg_convs=1),
    data=Data(root="datasets/VOCdevkit/VOC2007", image_size=96),
    train=Train(epochs=1, batch_size=8, device="cpu", dtype="float32"),
)
"""


def test_help_does_not_import_torch():
    code = (
        "import runpy, sys\n"
        f"for script in {SCRIPTS!r}:\n"
        "    sys.argv = [script, '--help']\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, (script, stop.code)\n"
        "    assert not {'torch', 'matplotlib', 'rich'} & set(sys.modules), script\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(SCRIPTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder whose VOC 2007 tree is synthetic images under names of VOC classes."""
    folder = tmp_path_factory.mktemp("work")
    root = folder / "datasets" / "VOCdevkit" / "VOC2007"
    render_shapes(root, num_train=24, num_test=6, image_size=96, seed=2)
    renamed = {"circle": "car", "square": "bus", "triangle": "cat", "star": "dog", "ring": "cow"}
    for path in root.glob("Annotations/*.xml"):
        text = path.read_text()
        for shape, name in {**renamed, "cross": "person"}.items():
            text = text.replace(f"<name>{shape}</name>", f"<name>{name}</name>")
        path.write_text(text)
    (folder / "tiny.py").write_text(_TINY)
    (folder / "empty.pt").touch()
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run a script in this process, in the working folder: it need not import torch again."""

    def run(script, *arguments, status=0):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        ended = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            ended = stop.code
        out, err = capsys.readouterr()
        assert ended == status, err
        return out if status == 0 else err

    return run


def test_from_training_to_a_picture_with_no_more_arguments_than_needed(
    run, folder, caplog, every_step_said
):
    run("tools/train.py", "tiny.py")
    trained = folder / "runs" / "tiny" / "1"
    metrics = json.loads((trained / "metrics.json").read_text())
    assert len(metrics["per_class"]) == 20

    stored, best = trained / "experiment.json", trained / "best.pt"
    tested = run("tools/test.py", stored, best, "--eval", "mAP", "--out", "numbers.json")
    assert json.loads((folder / "numbers.json").read_text())["AP50"] == metrics["AP50"]

    assert "-> 0" in run("deploy/reparam.py")
    assert (trained / "deploy.pt").is_file()
    assert "agreement" in run("deploy/export_onnx.py", "--size", 96, 96)
    file = trained / "deploy.onnx"

    timed = run("tools/speed.py", "--fp16", "--images", 3)
    assert "CPU" in timed
    assert "img/s" in timed

    images = folder / "datasets/VOCdevkit/VOC2007/JPEGImages"
    image = next(images.glob("*.jpg"))
    run("tools/image_demo.py", image, trained / "deploy.pt", "--out", "drawn.png")
    assert (folder / "drawn.png").stat().st_size > 0

    refused = run("tools/image_demo.py", image, trained, status=2)
    assert f"{trained}: is a folder; name a checkpoint in it: {trained / 'best.pt'}" in refused

    (folder / "broken.jpg").write_text("no image")
    shown = run(
        *("tools/image_demo.py", image, "broken.jpg", images / "*1.jpg", file),
        *("--out", "drawn"),
    )
    assert f"checkpoint  {file}\n" in shown
    assert "broken.jpg: cannot be decoded" in caplog.text
    pictures = {image, *images.glob("*1.jpg")}
    assert f"in {len(pictures)} images, 1 skipped" in shown
    assert {path.name for path in (folder / "drawn").iterdir()} == {
        f"{path.stem}_detections.jpg" for path in pictures
    }
    assert run("tools/test.py", stored, file) == tested

    with VideoFile(folder / "film.mp4", 5) as film:
        for frame in torch.zeros(3, 3, 64, 96, dtype=torch.uint8):
            film.write(frame)
    assert "in 3 frames" in run("tools/video_demo.py", "film.mp4", file)
    assert "film.mp4: 3/3 frames" in every_step_said()
    assert open_video(folder / "film_detections.mp4").frames == 3
    watched = run("tools/webcam_demo.py", file, "--camera-id", "film.mp4", "--out", "camera.avi")
    assert "written to camera.avi" in watched
    # However many frames were skipped, the recording lasts as long as what was seen.
    assert open_video(folder / "camera.avi").frames == 3

    run("tools/train.py", "tiny.py", "--resume", "--set", "train.epochs=2")
    assert json.loads((trained / "metrics.json").read_text())["epochs"] == 2


def test_a_budget_of_time_becomes_epochs(run, folder, monkeypatch):
    def time_steps(experiment, steps):
        assert (experiment.name, steps) == ("tiny", 20)
        return StepTime(1.5, 3, "bfloat16", "contiguous")

    monkeypatch.setattr(plan, "time_steps", time_steps)
    said = run("tools/train.py", "tiny.py", "--budget", "10s", "--work-dir", "ten")
    assert "--budget 10s: 2 epochs in bfloat16 (3 steps of 1.5 s per epoch)" in said
    metrics = json.loads((folder / "ten" / "metrics.json").read_text())
    found = [metrics[name] for name in ("epochs", "dtype", "memory_format")]
    assert found == [2, "bfloat16", "contiguous"]
    told = run("tools/train.py", "tiny.py", "--budget", "4s", "--work-dir", "four", status=2)
    assert told.count("\n") == 1
    assert "one epoch takes about 4.5s" in told
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = run("tools/train.py", "tiny.py", "--budget", "10s", "--work-dir", "four", status=2)
    assert "give several --set train.epochs=N" in told
    assert not (folder / "four").exists()


_OWN = """
import timm
from dataclasses import replace
from timm.models import register_model
from tiny import experiment as base

@register_model
def own_resnet(pretrained=False, **options):
    return timm.create_model("test_resnet", pretrained=pretrained, **options)

experiment = replace(base, model=replace(base.model, backbone="own_resnet"))
"""


@pytest.mark.filterwarnings("ignore:Overwriting own_resnet")
def test_the_printed_command_resumes_what_only_its_file_can_build(run, folder, monkeypatch, caplog):
    (folder / "own.py").write_text(_OWN)
    times = iter([StepTime(1.5, 3, "float32", "contiguous")])  # a second timing would be an error
    monkeypatch.setattr(plan, "time_steps", lambda *_: next(times))
    caplog.set_level("INFO")

    def interrupted(*_):
        raise KeyboardInterrupt

    given = ["own.py", "--budget", "10s", "--seed", 3, "--set", "data.image_size=64"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_detector", interrupted)
        run("tools/train.py", *given, "--work-dir", "own run", status=130)
    (line,) = (m for m in caplog.messages if m.startswith("resume with: "))
    python, script, *arguments = shlex.split(line.removeprefix("resume with: "))
    assert (python, script) == ("python", "tools/train.py")
    said = run(script, *arguments)
    assert "--budget 10s: 2 epochs, as when the run began" in said
    written = json.loads((folder / "own run" / "experiment.json").read_text())
    assert written["train"]["seed"] == 3
    assert json.loads((folder / "own run" / "metrics.json").read_text())["epochs"] == 2
    # "The same command with --resume", of a run that needs nothing more.
    told = run("tools/train.py", *given, "--work-dir", "own run", "--resume", status=2)
    assert "finished its 2 epochs" in told


def test_zoo(run, folder):
    options = ["--size", 64, 64, "--turns", 1, "--threads", 1, "--device", "cpu", "--out", "zoo"]
    assert "tiny: " in run("tools/zoo.py", "tiny.py", *options)
    (row,) = json.loads((folder / "zoo" / "experiments.json").read_text())["rows"]
    assert (row["experiment"], row["size"], row["images"]) == ("tiny", [64, 64], 10)
    assert row["latency_ms"] > 0


@pytest.mark.slow
def test_missing_weights_name_the_choices_and_leave_no_run(folder):
    # A hub that refuses the connection, and an empty cache of it.
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/train.py"), EXPERIMENT, "--work-dir", "none"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
    )
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert "model.weights=random" in line
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["tools/train.py", EXPERIMENT, "--set", "data.root=no"], "tools/download_voc07.sh"),
        (["tools/train.py", "missing.py"], "missing.py: no such experiment"),
        (["tools/train.py", EXPERIMENT, "--set", "trian.epochs=1"], "did you mean train.epochs"),
        # Before the data, which is not there, is looked for.
        (
            ["tools/train.py", EXPERIMENT, "--set", "model.backbone=resnet81", "data.root=no"],
            "did you mean resnet18",
        ),
        (
            ["tools/train.py", EXPERIMENT, "--device", "cuda:99", "--set", "data.root=."],
            "device cuda:99",
        ),
        (["tools/train.py", EXPERIMENT, "--resume-from", "x.pt"], "x.pt: no such checkpoint"),
        (
            ["tools/test.py", "empty.pt", EXPERIMENT],
            "empty.pt: an experiment is a .py or .json file",
        ),
        (["tools/flops.py", "quickstrat.py"], "quickstrat.py: no such experiment file"),
        (["tools/flops.py", EXPERIMENT, "--shape", 1, 2, 3], "--shape 1 2 3: give height"),
        (["tools/zoo.py", "tny", "--out", "no"], "tny: no such experiment in experiments"),
        (["tools/zoo.py", "tiny.py", "--threads", 0], "--threads 0: must be at least 1"),
        (
            ["tools/test.py", EXPERIMENT, "a.onnx", "--set", "model.nms_iou=0.5"],
            "--set model.nms_iou=0.5: a.onnx is an ONNX file",
        ),
        (["deploy/export_onnx.py", "a.pt", "--out", "no/a.onnx"], "there is no folder no"),
        (["deploy/quantize.py", "a.pt", "--out", "a.pt"], "--out a.pt: end the name in .onnx"),
        (["deploy/reparam.py", "a.pt", "--out", "."], "--out .: is a folder"),
        (["tools/webcam_demo.py", "--camera-id", "empty.pt", "--out", "empty.pt"], "itself"),
        (["tools/speed.py", "--set", "train.epochs=1"], "name its file before the checkpoint"),
        (["tools/image_demo.py", "tiny.py"], "name an image before the experiment"),
        (["deploy/reparam.py", EXPERIMENT], "runs/rexnet_yolof"),
        (["deploy/export_onnx.py", EXPERIMENT], "runs/rexnet_yolof"),
        (["deploy/quantize.py", "x.pt", "--images", 0], "--images 0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(run, folder, command, says):
    (line,) = run(*command, status=2).strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (folder / "no").exists()
