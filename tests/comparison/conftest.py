from pathlib import Path

import pytest

from tinydet.data.shapes import render_shapes

_EXPERIMENT = """
from tinydet.config import Augment, Data, Experiment, Model, Optim, Train
experiment = Experiment(
    model=Model(backbone="test_resnet", weights="random", encoder_channels=32,
                encoder_mid_channels=16, dilations=(2,), cls_convs=1, reg_convs=1),
    data=Data(root="set", source="shapes", classes=(), image_size=96, augment=Augment(), workers=0),
    optim=Optim(optimizer="adamw", lr={lr}, warmup_iters=2, schedule="cosine"),
    train=Train(epochs=9, batch_size=8, dtype="float32", memory_format="contiguous", device="cpu"),
)
"""


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("compared") / "set"
    render_shapes(root, num_train=24, num_test=8, image_size=96, seed=1)
    return root


def write_experiments(rendered):
    """Put base, its copy and an idea, on two dozen images, into the working folder."""
    Path("set").symlink_to(rendered)
    Path("base.py").write_text(_EXPERIMENT.format(lr="2e-3"))
    Path("copy.py").write_text("from base import experiment\n")
    Path("idea.py").write_text(_EXPERIMENT.format(lr="1e-3"))


@pytest.fixture
def folder(tmp_path, rendered, monkeypatch):
    """A working folder with experiments."""
    monkeypatch.chdir(tmp_path)
    write_experiments(rendered)
    return tmp_path
