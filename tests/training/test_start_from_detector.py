import json
from dataclasses import replace

import pytest
import torch

from tinydet.data.shapes import SHAPES, render_shapes
from tinydet.deployment.fold_checkpoint import fold_checkpoint
from tinydet.experiment_file import load_experiment
from tinydet.training.checkpoint import load_checkpoint
from tinydet.training.loop import prepare, train


@pytest.fixture(scope="module")
def trained(tiny_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_experiment, folder)
    return folder / "last.pt", fold_checkpoint(folder / "last.pt").path


def start(experiment, path):
    """Return a new run's detector and the losses in training of its first batch."""
    model = replace(experiment.model, weights=str(path))
    state, loader, *_ = prepare(replace(experiment, model=model), torch.device("cpu"))
    batch = next(iter(loader))
    with torch.no_grad():
        return state.detector, state.detector.train()(batch.images, batch.targets)[0], batch


def test_training_goes_on_from_the_folded_network(tiny_experiment, trained):
    checkpoint, deployed = trained
    _, losses, batch = start(tiny_experiment, deployed)
    with torch.no_grad():
        expected = load_checkpoint(checkpoint).detector(batch.images, batch.targets)[0]
    # Its norms use the statistics of the batch, for which they were calibrated.
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_an_epoch_from_a_detector_of_other_classes_is_worth_more_than_one_from_imagenet(tmp_path):
    render_shapes(tmp_path / "set", num_train=240, num_test=60, image_size=128, seed=5)
    plain = load_experiment("experiments/quickstart.py")
    data = replace(plain.data, root=str(tmp_path / "set"), image_size=128, workers=0)

    def ap50(name, weights, epochs, classes):
        (tmp_path / name).mkdir()
        experiment = replace(
            plain,
            model=replace(plain.model, weights=weights),
            data=replace(data, classes=classes),
            train=replace(plain.train, epochs=epochs),
        )
        train(experiment, tmp_path / name)
        return json.loads((tmp_path / name / "metrics.json").read_text())["AP50"]

    ap50("first", "imagenet", 6, SHAPES[3:])
    from_detector = ap50("detector", str(tmp_path / "first" / "last.pt"), 1, SHAPES)
    from_imagenet = ap50("imagenet", "imagenet", 1, SHAPES)
    assert from_detector > 3 * from_imagenet
    assert from_detector > 0.1
