"""Reading and matching state dicts: files of every kind, and tensor names with any prefix."""

import io
import pickle
import re
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from tinydet.backbones.state_dict import without_prefix
from tinydet.backbones.weights import load_weights
from tinydet.config import ConfigError


def _pickle(thing):
    return pickle.dumps(thing, protocol=2)


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def _zip(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


_TENSORS = {"conv_stem.weight": torch.ones(16, 3, 3, 3)}
_FILES = {
    "empty.pth": (b"", r"is empty \(0 bytes\)"),
    "empty.safetensors": (b"", r"is empty \(0 bytes\)"),
    "login.pth": (b"<!DOCTYPE html><html><body>Log in", "web page .*download the file itself"),
    "page.safetensors": (b"\xef\xbb\xbf\n<html>", "web page"),
    "index.pth": (b'{"weight_map": {}}', "JSON"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "other.pth": (_zip(readme="text"), "zip archive, but not one of torch's"),
    "cut.pth": (_saved(_TENSORS)[:-30], "damaged or truncated"),
    "cut.safetensors": (save(_TENSORS)[:-4], "damaged, truncated"),
    "junk.safetensors": (b"hello", "not a safetensors file"),
    "junk.pth": (b"hello", "neither a torch nor"),
    "renamed.pth": (save(_TENSORS), r"is a \.safetensors file under another name"),
    "renamed.safetensors": (_saved(_TENSORS), r"is a \.pth file under another name"),
    "model.pth": (_saved(nn.Linear(2, 2)), r"Python objects or code.* state_dict\(\) alone"),
    "code.pt": (_saved({"a": print}), r"Python objects or code.* state_dict\(\) alone"),
    "old.pth": (_pickle({"a": print}), r"Python objects or code.* state_dict\(\) alone"),
    "list.pth": (_saved([1, 2]), "contains no state dict"),
    "nothing.pth": (_saved({}), "contains no state dict"),
    "number.pth": (_saved({"model": 3}), "contains no state dict"),
}


@pytest.mark.parametrize("file_name", _FILES)
def test_a_file_that_is_no_weights_is_refused_in_one_line(tmp_path, file_name):
    content, says = _FILES[file_name]
    path = tmp_path / file_name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"model.weights={re.escape(str(path))}: .*{says}") as e:
        _load("mobilenetv3_small_050", path)
    assert "\n" not in str(e.value)
    assert "weights_only" not in str(e.value)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "yolov5n", "repvgg_a0"])
def test_every_reader_refuses_a_page_a_folder_and_no_file(tmp_path, name):
    (tmp_path / "page.pt").write_bytes(b"<html>")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder").mkdir()
    for file_name, says in [
        ("page.pt", "web page"),
        ("empty.pt", "is empty"),
        ("folder", "is a folder"),
        ("none.pt", "no such file"),
    ]:
        with pytest.raises(ConfigError, match=f"model.weights=.*{file_name}: .*{says}"):
            _load(name, tmp_path / file_name)


def _load(name, path):
    # No backbone: the file is refused before the names of its tensors matter.
    load_weights(nn.Identity(), nn.Identity, name, str(path))


_part = st.sampled_from(["conv", "bn1", "stages", "stages_0", "0", "model", "module", "weight"])
_name = st.lists(_part, min_size=1, max_size=4).map(".".join)
_prefix = st.lists(_part, max_size=3).map(lambda parts: "".join(f"{part}." for part in parts))
_names = st.lists(_name, min_size=1, max_size=8, unique_by=lambda name: name.replace("_", "."))


@given(
    names=_names,
    prefix=_prefix,
)
def test_a_prefix_of_all_names_is_found_whatever_it_is(names, prefix):
    tensors = {f"{prefix}{name}": number for number, name in enumerate(names)}
    found, taken_off = without_prefix(tensors, names)
    # Another prefix may do as well where the names repeat themselves, but none is better.
    assert set(found) <= {name.removeprefix(taken_off) for name in tensors}
    assert len(found.keys() & set(names)) == len(names)
    assert all(tensors[f"{taken_off}{name}"] == number for name, number in found.items())


@given(names=_names)
def test_names_that_fit_are_left_alone(names):
    tensors = {name: number for number, name in enumerate(names)}
    assert without_prefix(tensors, names) == (tensors, "")


def test_other_parts_of_the_network_are_left_out():
    tensors = {"backbone.conv.weight": 1, "backbone.stages_0.conv.weight": 2, "head.weight": 3}
    found, prefix = without_prefix(tensors, ["conv.weight", "stages.0.conv.weight", "fc.weight"])
    assert prefix == "backbone."
    assert found == {"conv.weight": 1, "stages_0.conv.weight": 2}
