from dataclasses import replace

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Small tensors: a second thread costs more than it gives, far more on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYDET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def said(caplog):
    """Return the lines in which long tasks have said how far they are."""
    caplog.set_level("INFO", "tinydet.progress")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "tinydet.progress"]


@pytest.fixture
def every_step_said(said, monkeypatch):
    """As `said`, with a line at every step instead of every 30 seconds."""
    from tinydet.progress import Progress

    monkeypatch.setitem(Progress.__init__.__kwdefaults__, "interval", 0.0)
    return said


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory):
    """Two dozen synthetic images and a network that trains in seconds."""
    from tinydet.config import Augment, Data, Experiment, Model, Optim, Train
    from tinydet.data.shapes import render_shapes

    root = tmp_path_factory.mktemp("shapes") / "set"
    render_shapes(root, num_train=24, num_test=8, image_size=96, seed=1)
    return Experiment(
        name="tiny",
        model=Model(
            backbone="mobilenetv3_small_050",
            weights="random",
            encoder_channels=32,
            encoder_mid_channels=16,
            dilations=(2,),
            cls_convs=1,
            reg_convs=1,
        ),
        data=replace(
            Data(),
            root=str(root),
            source="shapes",
            classes=(),
            image_size=96,
            augment=Augment(),
            workers=0,
        ),
        optim=Optim(optimizer="adamw", lr=1e-3, warmup_iters=2, schedule="cosine"),
        train=Train(
            epochs=2,
            batch_size=8,
            dtype="float32",
            memory_format="contiguous",
            ema_decay=0.9,
            device="cpu",
        ),
    )
