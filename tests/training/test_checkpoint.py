import os
import pickle
from dataclasses import replace

import pytest
import torch

from tinydet.experiment_file import experiment_to_dict
from tinydet.reparam.expand import expanded_names
from tinydet.reparam.fold import fold
from tinydet.training.checkpoint import (
    CheckpointError,
    load_detector,
    read_checkpoint,
    save_checkpoint,
)
from tinydet.yolof.detector import build_detector

IMAGES = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)


@pytest.fixture
def detector(tiny_experiment):
    torch.manual_seed(0)
    detector = build_detector(tiny_experiment.model, ["a", "b"])
    detector(IMAGES)  # moves the running statistics
    return detector.eval()


def _content(experiment, detector, form="training"):
    return {
        "form": form,
        "experiment": experiment_to_dict(experiment),
        "classes": list(detector.classes),
        "model": detector.state_dict(),
    }


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_a_detector_comes_back_the_same(tmp_path, tiny_experiment, detector, form):
    expected = detector(IMAGES)
    if form == "deploy":
        detector, _ = fold(detector, IMAGES)
    path = tmp_path / "best.pt"
    save_checkpoint(path, _content(tiny_experiment, detector, form))
    loaded = load_detector(path)
    assert not loaded.training
    assert loaded.classes == ("a", "b")
    torch.testing.assert_close(loaded(IMAGES), expected, rtol=1e-4, atol=1e-4)
    has_norms = any(isinstance(m, torch.nn.BatchNorm2d) for m in loaded.modules())
    assert has_norms == (form == "training")


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_an_expanded_detector_comes_back_the_same(tmp_path, tiny_experiment, form):
    model = replace(tiny_experiment.model, expand="dbb", expand_where="3x3")
    experiment = replace(tiny_experiment, model=model)
    detector = build_detector(model, ["a", "b"])
    detector(IMAGES)  # moves the running statistics
    for name, parameter in detector.eval().named_parameters():
        if ".branches." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = detector(IMAGES)
    if form == "deploy":
        detector, _ = fold(detector, IMAGES)
    save_checkpoint(tmp_path / "best.pt", _content(experiment, detector, form))
    loaded = load_detector(tmp_path / "best.pt")
    assert bool(expanded_names(loaded)) == (form == "training")
    torch.testing.assert_close(loaded(IMAGES), expected, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_from_before_a_field_was_there_still_loads(
    tmp_path, tiny_experiment, detector
):
    content = _content(tiny_experiment, detector)
    for name in ("expand", "expand_where"):
        del content["experiment"]["model"][name]
    save_checkpoint(tmp_path / "old.pt", content)
    torch.testing.assert_close(load_detector(tmp_path / "old.pt")(IMAGES), detector(IMAGES))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def dies(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class _Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"form": "training", "model": _Bomb()}, "bomb.pt")
    with pytest.raises(CheckpointError, match=r"bomb\.pt: refused"):
        read_checkpoint("bomb.pt")
    with open("raw.pt", "wb") as file:
        pickle.dump(_Bomb(), file)
    with pytest.raises(CheckpointError):
        read_checkpoint("raw.pt")
    assert not (tmp_path / "exploded").exists()


def test_what_is_wrong_with_a_file_is_said(tmp_path, tiny_experiment, detector):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"is a folder; .*best\.pt"):
        read_checkpoint(tmp_path)
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, _content(tiny_experiment, detector))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"cut\.pt: damaged"):
        read_checkpoint(cut)
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="not a TinyDet checkpoint"):
        read_checkpoint(other)


def test_weights_of_another_model_are_refused(tmp_path, tiny_experiment, detector):
    content = _content(tiny_experiment, detector)
    content["experiment"]["model"]["encoder_channels"] = 48
    save_checkpoint(tmp_path / "x.pt", content)
    with pytest.raises(CheckpointError, match="not those of experiment 'tiny'"):
        load_detector(tmp_path / "x.pt")
