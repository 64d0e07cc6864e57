from dataclasses import replace

import pytest

from tinydet.config import Augment, Data, Experiment, Model, Optim, Train
from tinydet.data.shapes import render_shapes


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory):
    """Two dozen synthetic images and a network that trains in seconds."""
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
