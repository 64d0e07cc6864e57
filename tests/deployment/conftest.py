import json
import os
from pathlib import Path

import pytest
import torch

from tinydet.config import Data, Experiment, Model
from tinydet.deployment.fold_checkpoint import fold_detector
from tinydet.experiment_file import experiment_to_dict
from tinydet.training.checkpoint import save_checkpoint
from tinydet.yolof.build import build_detector

# Exports in about a second; with few candidates, so that selection has limits to reach.
_MODEL = Model(
    backbone="test_resnet",
    weights="random",
    encoder_channels=16,
    encoder_mid_channels=8,
    dilations=(2,),
    cls_convs=1,
    reg_convs=1,
    candidates=200,
    max_detections=50,
)
_CLASSES = ("circle", "square", "triangle")


def _detector(model=_MODEL):
    """A detector with varied norms and scores, so that it finds things in noise."""
    torch.manual_seed(0)
    detector = build_detector(model, _CLASSES).eval()
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.1)
        head = detector.head
        head.cls_score.bias.fill_(-1)
        for conv, spread in ((head.cls_score, 0.3), (head.objectness, 0.3), (head.box_delta, 0.1)):
            conv.weight.normal_(0, spread)
    return detector


@pytest.fixture(scope="session")
def make_detector():
    return _detector


@pytest.fixture(scope="session")
def detector():
    """Treat it as read-only."""
    return _detector()


@pytest.fixture(scope="session")
def folded(detector):
    """The detector in deploy form; treat it as read-only."""
    return fold_detector(detector)[0]


@pytest.fixture(scope="session")
def exported(folded):
    """The folded detector as an ONNX model for any size; treat it as read-only."""
    pytest.importorskip("onnxscript")
    from tinydet.deployment.onnx import export_detector

    return export_detector(folded, Data(image_size=96, short_side=64))


@pytest.fixture(scope="session")
def exported_fixed(folded):
    """The same for inputs of 64x96."""
    pytest.importorskip("onnxscript")
    from tinydet.deployment.onnx import export_detector

    return export_detector(folded, Data(image_size=96, short_side=64), (64, 96))


@pytest.fixture
def make_checkpoint(tmp_path):
    """Write a training checkpoint of a detector; its data is not there unless `data` is given."""

    def make(detector, data=None):
        data = data or Data(root=str(tmp_path / "none"), source="folder", image_size=128)
        experiment = Experiment(name="tiny", model=detector.config, data=data)
        path = tmp_path / "runs" / "tiny" / "1" / "best.pt"
        content = {
            "form": "training",
            "experiment": experiment_to_dict(experiment),
            "classes": list(detector.classes),
            "model": detector.state_dict(),
            "epoch": 3,
        }
        save_checkpoint(path, content)
        return path

    return make


_TINY = """
from tinydet.config import Data, Experiment, Model, Train
experiment = Experiment(
    model=Model(backbone="test_resnet", encoder_channels={channels},
                encoder_mid_channels=16, dilations=(2,), cls_convs=1, reg_convs=1),
    data=Data(root="datasets/none", classes=("cat", "dog"), image_size=40),
    train=Train(epochs=2),
)
"""


@pytest.fixture
def two_experiments(tmp_path, monkeypatch):
    """A working folder with the experiments "narrow" and "wide"."""
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/narrow.py").write_text(_TINY.format(channels=16))
    Path("experiments/wide.py").write_text(_TINY.format(channels=32))
    return tmp_path


@pytest.fixture(scope="session")
def write_run():
    """Write the files of a finished run in the working folder."""

    def write(name, number, experiment, **metrics):
        run = Path("runs") / name / str(number)
        run.mkdir(parents=True)
        (run / "experiment.json").write_text(json.dumps(experiment_to_dict(experiment)))
        (run / "metrics.json").write_text(json.dumps({"AP50": 0.5, "epochs": 2, **metrics}))
        os.utime(run / "metrics.json", (1000 + number, 1000 + number))
        return run

    return write
