"""The command lines as a user types them: help, mistakes, and the whole path once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinydet.data.shapes import render_shapes
from tinydet.report.video import VideoFile, open_video

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tools", "deploy")
    for path in ROOT.glob(f"{folder}/*.py")
)
EXPERIMENT = str(ROOT / "experiments" / "rexnet_yolof.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_import_torch(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def _run(script, *arguments, cwd):
    settings = {
        "OMP_NUM_THREADS": "1",
        # A hub that refuses the connection, and an empty cache of it.
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(cwd / "hub"),
    }
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **settings},
    )


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
    return folder


SMALL = [
    "model.weights=random",
    "data.image_size=96",
    "train.epochs=1",
    "model.encoder_channels=32",
]


def test_from_training_to_a_picture_with_no_more_arguments_than_needed(folder):
    trained = _run("tools/train.py", EXPERIMENT, "--set", *SMALL, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    run = folder / "runs" / "rexnet_yolof" / "1"
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["per_class"]) == 20

    stored = run / "experiment.json"
    tested = _run(
        *("tools/test.py", stored, run / "best.pt", "--eval", "mAP", "--out", "numbers.json"),
        cwd=folder,
    )
    assert tested.returncode == 0, tested.stderr
    assert json.loads((folder / "numbers.json").read_text())["AP50"] == metrics["AP50"]

    folded = _run("deploy/reparam.py", cwd=folder)
    assert folded.returncode == 0, folded.stderr
    assert "-> 0" in folded.stdout
    assert (run / "deploy.pt").is_file()

    exported = _run("deploy/export_onnx.py", "--size", "96", "96", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    assert (run / "deploy.onnx").is_file()

    timed = _run("tools/speed.py", "--fp16", "--images", "3", cwd=folder)
    assert timed.returncode == 0, timed.stderr
    assert "CPU" in timed.stdout
    assert "img/s" in timed.stdout

    image = next((folder / "datasets/VOCdevkit/VOC2007/JPEGImages").glob("*.jpg"))
    drawn = _run(
        *("tools/image_demo.py", image, run / "deploy.pt", "--out", "drawn.png"), cwd=folder
    )
    assert drawn.returncode == 0, drawn.stderr
    assert (folder / "drawn.png").stat().st_size > 0

    (folder / "broken.jpg").write_text("no image")
    shown = _run(
        *("tools/image_demo.py", image, "broken.jpg", image.parent / "*1.jpg", run / "deploy.onnx"),
        *("--out", "drawn"),
        cwd=folder,
    )
    assert shown.returncode == 0, shown.stderr
    assert f"by {run / 'deploy.onnx'}\n" in shown.stdout
    assert "broken.jpg: cannot be decoded" in shown.stdout
    pictures = {image, *image.parent.glob("*1.jpg")}
    assert f"in {len(pictures)} images, 1 left out" in shown.stdout
    assert {path.name for path in (folder / "drawn").iterdir()} == {
        f"{path.stem}_detections.jpg" for path in pictures
    }
    rated = _run("tools/test.py", stored, run / "deploy.onnx", cwd=folder)
    assert rated.returncode == 0, rated.stderr
    assert rated.stdout == tested.stdout

    with VideoFile(folder / "film.mp4", 5) as film:
        for frame in torch.zeros(3, 3, 64, 96, dtype=torch.uint8):
            film.write(frame)
    filmed = _run("tools/video_demo.py", "film.mp4", run / "deploy.onnx", cwd=folder)
    assert filmed.returncode == 0, filmed.stderr
    assert "in 3 frames" in filmed.stdout
    assert open_video(folder / "film_detections.mp4").frames == 3
    watched = _run(
        *("tools/webcam_demo.py", run / "deploy.onnx", "--camera-id", "film.mp4"),
        *("--out", "camera.avi"),
        cwd=folder,
    )
    assert watched.returncode == 0, watched.stderr
    assert "in camera.avi" in watched.stdout
    # However many frames were left out, what is recorded lasts as long as what was seen.
    assert open_video(folder / "camera.avi").frames == 3

    resumed = _run(
        *("tools/train.py", EXPERIMENT, "--resume", "--set", *SMALL, "train.epochs=2"), cwd=folder
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 2


def _mistake(done):
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.strip().splitlines()
    return line


def test_missing_data_names_the_command_that_fetches_it(tmp_path):
    line = _mistake(_run("tools/train.py", EXPERIMENT, cwd=tmp_path))
    assert "tools/download_voc07.sh" in line
    assert not (tmp_path / "runs").exists()


def test_missing_weights_name_the_choices_and_leave_no_run(folder):
    line = _mistake(_run("tools/train.py", EXPERIMENT, "--work-dir", "none", cwd=folder))
    assert "model.weights=random" in line
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.py"], "missing.py: no such experiment"),
        (["deploy.pt", EXPERIMENT], "deploy.pt: an experiment is a .py or .json file"),
        ([EXPERIMENT, "--set", "trian.epochs=1"], "did you mean train.epochs"),
        # Before the data, which is not there, is looked for.
        ([EXPERIMENT, "--set", "model.backbone=resnet81", "data.root=no"], "did you mean resnet18"),
        ([EXPERIMENT, "--device", "cuda:99", "--set", "data.root=."], "device cuda:99"),
        ([EXPERIMENT, "--resume-from", "gone.pt"], "gone.pt: no such checkpoint"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, says):
    script = "tools/test.py" if arguments[0] == "deploy.pt" else "tools/train.py"
    (folder / "deploy.pt").touch()
    assert says in _mistake(_run(script, *arguments, cwd=folder))
