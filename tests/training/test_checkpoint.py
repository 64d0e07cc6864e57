import io
import os
import pickle
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinydet.config import ConfigError
from tinydet.experiment_file import experiment_to_dict
from tinydet.reparam.expand import expanded_names
from tinydet.reparam.fold import fold
from tinydet.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    read_last,
    save_checkpoint,
    save_last,
    write_tensors,
)
from tinydet.training.loop import train
from tinydet.yolof.build import build_detector

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
    loaded = load_checkpoint(path).detector
    assert not loaded.training
    assert loaded.classes == ("a", "b")
    torch.testing.assert_close(loaded(IMAGES), expected, rtol=1e-4, atol=1e-4)
    has_norms = any(isinstance(m, torch.nn.BatchNorm2d) for m in loaded.modules())
    assert has_norms == (form == "training")


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("form", ["training", "deploy"])
def test_an_expanded_detector_comes_back_the_same(tmp_path, tiny_experiment, form, online):
    model = replace(tiny_experiment.model, expand="dbb", expand_where="3x3", expand_online=online)
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
    loaded = load_checkpoint(tmp_path / "best.pt").detector
    assert bool(expanded_names(loaded)) == (form == "training")
    torch.testing.assert_close(loaded(IMAGES), expected, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_from_before_a_field_was_there_still_loads(
    tmp_path, tiny_experiment, detector
):
    content = _content(tiny_experiment, detector)
    for name in ("expand", "expand_where", "expand_online"):
        del content["experiment"]["model"][name]
    save_checkpoint(tmp_path / "old.pt", content)
    torch.testing.assert_close(
        load_checkpoint(tmp_path / "old.pt").detector(IMAGES), detector(IMAGES)
    )


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


@pytest.mark.parametrize("size", [0, 10, 1000, 100_000])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_called_that(size):
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(Path("/dev/full"), {"a": torch.zeros(size), "b": torch.zeros(size)})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a loader process died")])
def test_what_interrupts_a_write_is_what_is_raised(error, tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, content):
            if self.tell() > 1000:
                raise error
            return super().write(content)

    monkeypatch.setattr(Path, "open", lambda path, mode: Interrupted(path, mode))
    with pytest.raises(type(error)) as caught:
        write_tensors(tmp_path / "a.pt", {"a": torch.zeros(1000), "b": torch.zeros(1000)})
    assert caught.value is error


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


@pytest.mark.parametrize("wrap", [dict, list, tuple])
def test_torchs_formats_of_old_are_refused_and_not_run(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    content = wrap({"form": _Bomb(), "model": _Bomb()}.items())
    # That of before 2020, a row of pickles: its magic number, version, system, then the content.
    torch.save(content, "legacy.pt", _use_new_zipfile_serialization=False)
    # That of before 2017, a tar of pickles.
    parts = {"pickle": content, "storages": content, "tensors": content, "sys_info": content}
    with tarfile.open("tar.pt", "w") as archive:
        for name, part in parts.items():
            data = pickle.dumps(part)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for name in ("legacy.pt", "tar.pt"):
        with pytest.raises(CheckpointError, match="no checkpoint") as caught:
            read_checkpoint(name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_a_turned_bit_is_noticed_wherever_it_is(tmp_path, tiny_experiment, detector):
    content = _content(tiny_experiment, detector)
    content["model"] = {"weight": torch.randn(500), "other": torch.arange(40)}
    path = tmp_path / "last.pt"
    save_checkpoint(path, content)
    whole = path.read_bytes()
    noticed = 0
    for position in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except CheckpointError:
            noticed += 1
            continue
        # Padding between the parts, dates and the like.
        assert read["experiment"] == content["experiment"]
        for name, tensor in content["model"].items():
            assert torch.equal(read["model"][name], tensor)
    assert noticed > 20


@pytest.mark.parametrize("dies_at", range(6))
def test_a_whole_checkpoint_is_left_whenever_the_process_dies(tmp_path, monkeypatch, dies_at):
    """At every call that touches the folder: the file opened, flushed, renamed, removed."""
    path = tmp_path / "last.pt"

    def content(epoch):
        return {"form": "training", "experiment": {}, "classes": [], "model": {}, "epoch": epoch}

    save_last(path, content(1))
    save_last(path, content(2))

    class Died(BaseException):
        pass

    calls = iter(range(100))

    def mortal(function):
        def call(*args, **kwargs):
            if next(calls) >= dies_at:
                raise Died
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(os, "fsync", mortal(os.fsync))
        patch.setattr(torch, "save", mortal(torch.save))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        with suppress(Died):
            save_last(path, content(3))
    # replace, fsync, replace come after save; a removal of what is left, last.
    expected = {0: 2, 1: 2, 2: 2, 3: 2, 4: 3, 5: 3}
    assert read_last(path)["epoch"] == expected[dies_at]
    if dies_at == 5:
        assert read_checkpoint(tmp_path / "last.previous.pt")["epoch"] == 2


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
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": 3},
        {"classes": [1, 2]},
        {"experiment": "tiny"},
        {"form": "other"},
        {"form": ["training"]},
        {"model": 3},
        {"model": {"backbone.conv.weight": "one"}},
    ],
)
def test_malformed_content_is_one_line(tmp_path, tiny_experiment, detector, wrong):
    path = tmp_path / "best.pt"
    save_checkpoint(path, _content(tiny_experiment, detector) | wrong)
    (name,) = wrong
    with pytest.raises(CheckpointError, match=f"not a TinyDet checkpoint, its '{name}' is malfo"):
        load_checkpoint(path)
    # As weights to start from it is one line too.
    model = replace(tiny_experiment.model, weights=str(path))
    with suppress(ConfigError):
        build_detector(model, ["a", "b"])


def test_a_checkpoint_without_a_run_s_state_cannot_be_resumed(tmp_path, tiny_experiment, detector):
    path = tmp_path / "best.pt"
    save_checkpoint(path, _content(tiny_experiment, detector))
    with pytest.raises(CheckpointError, match=r"cannot be resumed, it has no 'epoch'; take"):
        train(tiny_experiment, tmp_path / "run", path)
