import pytest
import torch

from tinydet.config import Data, Experiment, Model
from tinydet.experiment_file import experiment_to_dict
from tinydet.training.checkpoint import save_checkpoint
from tinydet.yolof.detector import build_detector

_MODEL = Model(
    backbone="mobilenetv3_small_050",
    weights="random",
    encoder_channels=32,
    encoder_mid_channels=16,
    dilations=(2, 4),
    candidates=200,
    max_detections=50,
)
# Exported in a moment.
_SMALL = Model(
    backbone="test_resnet",
    weights="random",
    encoder_channels=16,
    encoder_mid_channels=8,
    dilations=(2,),
    cls_convs=1,
    reg_convs=1,
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
def small_detector():
    """Treat it as read-only."""
    return _detector(_SMALL)


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
