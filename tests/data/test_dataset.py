import logging
from dataclasses import replace

import pytest

from tinydet.config import ConfigError, Data
from tinydet.data.convert import convert
from tinydet.data.dataset import fetch, is_missing, load_split
from tinydet.data.shapes import render_shapes


def few_shapes(root):
    render_shapes(root, num_train=4, num_test=2, image_size=64)


def test_load_split__renders_shapes_where_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("tinydet.data.shapes.render_shapes", few_shapes)
    data = Data(root=str(tmp_path / "shapes"), source="shapes", classes=())
    assert is_missing(data)
    assert len(load_split(data, "trainval")) == 4
    assert not is_missing(data)
    assert len(load_split(data, "test")) == 2


def test_load_split__missing_voc07_names_the_command(tmp_path):
    data = Data(root=str(tmp_path / "VOCdevkit/VOC2007"))
    with pytest.raises(FileNotFoundError, match=r"VOC2007.*run: bash tools/download_voc07\.sh"):
        load_split(data, "test")


def test_load_split__own_splits_under_the_default_source_name_the_setting(tree):
    tree.add("a")
    tree.split("a", name="train")
    tree.split("a", name="valid")
    with pytest.raises(FileNotFoundError, match=r"splits: train, valid; .* data\.source=folder"):
        load_split(Data(root=str(tree.root)), "trainval")


def test_load_split__the_home_folder_may_be_a_tilde(tree, monkeypatch):
    tree.add("a", [("dog", (1, 1, 9, 9))])
    tree.split("a", name="train")
    monkeypatch.setenv("HOME", str(tree.root.parent))
    data = Data(root=f"~/{tree.root.name}", source="folder", classes=(), train_split="train")
    index = load_split(data, "train")
    assert index.image_path(0) == tree.root / "JPEGImages" / "a.jpg"


def test_load_split__missing_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        data = Data(root=str(tmp_path / name), source="folder")
        assert is_missing(data)
        with pytest.raises(FileNotFoundError, match=f"{name}: no such folder, or it is empty"):
            load_split(data, "test")
        with pytest.raises(FileNotFoundError, match=name):
            fetch(data)


def test_is_missing__half_of_voc07(tree):
    tree.add("a")
    tree.split("a", name="trainval")
    data = Data(root=str(tree.root))
    assert is_missing(data)
    assert not is_missing(Data(root=str(tree.root), source="folder"))
    # A split of the user's own, or misspelt, is no reason to download.
    assert not is_missing(Data(root=str(tree.root), test_split="tset"))
    tree.split("a", name="test")
    assert not is_missing(data)


def test_fetch__voc07_goes_where_the_archives_unpack_to(tmp_path, monkeypatch):
    roots = []
    monkeypatch.setattr("tinydet.data.download.download_voc07", roots.append)
    fetch(Data(root=str(tmp_path / "VOCdevkit" / "VOC2007")))
    assert roots == [tmp_path]
    with pytest.raises(ValueError, match=r"data\.root=.*end in that"):
        fetch(Data(root=str(tmp_path / "elsewhere")))


def test_load_split__classes_are_those_of_the_training_split(tree):
    tree.add("a", [("bird", (1, 1, 9, 9)), ("dog", (1, 1, 9, 9))])
    tree.add("b", [("dog", (1, 1, 9, 9)), ("cow", (1, 1, 9, 9))])
    tree.split("a", name="trainval")
    tree.split("b", name="test")
    data = Data(root=str(tree.root), source="folder", classes=())
    assert load_split(data, "trainval").classes == ("bird", "dog")
    index = load_split(data, "test")
    assert index.classes == ("bird", "dog")
    assert index.labels.tolist() == [1]
    assert index.problems.unknown_classes == {"cow": 1}


def test_load_split__says_what_was_wrong(tree, caplog):
    tree.add("a", [("dog", (1, 1, 9, 9)), ("dog", (3, 3, 3, 3))])
    tree.split("a", name="trainval")
    data = Data(root=str(tree.root), source="folder", classes=("dog",))
    with caplog.at_level(logging.WARNING):
        load_split(data, "trainval")
    (record,) = caplog.records
    assert "trainval" in record.getMessage()
    assert "boxes without area, dropped: 1 (a: dog 3,3,3,3)" in record.getMessage()


@pytest.mark.parametrize("layout", ["voc", "coco", "yolo"])
def test_load_split__a_folder_in_another_layout_names_the_setting(layout, tmp_path):
    few_shapes(tmp_path / "shapes")
    root = tmp_path / layout
    convert(tmp_path / "shapes", root, layout)
    sources = {"voc": "folder", "coco": "coco", "yolo": "yolo"}
    splits = "train, val" if layout == "yolo" else "test, trainval"
    words = f"{layout.upper()} layout (splits: {splits}): set data.source={sources[layout]}"
    for source in {*sources.values(), *(["voc07"] * (layout != "voc"))} - {sources[layout]}:
        with pytest.raises(FileNotFoundError) as caught:
            load_split(Data(root=str(root), source=source, classes=()), "trainval")
        assert words in str(caught.value)
    data = Data(root=str(root), source=sources[layout], classes=(), train_split="trian")
    with pytest.raises(FileNotFoundError) as caught:
        load_split(data, "trian")
    assert "no split trian" in str(caught.value)
    assert "layout" not in str(caught.value)


def test_load_split__missing_coco_names_what_to_fetch(tmp_path):
    data = Data(root=str(tmp_path / "coco"), source="coco", train_split="train2017", classes=())
    assert is_missing(data)
    for attempt in (fetch, lambda d: load_split(d, "train2017")):
        with pytest.raises(FileNotFoundError, match=r"coco: no such.*train2017\.zip.*val2017\.zip"):
            attempt(data)


def test_load_split__unknown_class_names_the_nearest(coco_tree):
    coco_tree.image(1)
    coco_tree.object(1, 2, (1, 1, 5, 5))
    coco_tree.write()
    data = Data(root=str(coco_tree.root), source="coco", train_split="train", test_split="test")
    assert load_split(replace(data, classes=("cat", "dog")), "train").classes == ("cat", "dog")
    with pytest.raises(
        ConfigError, match=r"data\.classes: .*\(train\) does not have dogg: did you"
    ):
        load_split(replace(data, classes=("cat", "dogg")), "train")
    with pytest.raises(
        ConfigError, match=r"does not have aeroplane; bicycle;"
    ):  # VOC's, the default
        load_split(data, "train")


def test_load_split__labels_are_those_of_the_training_split(coco_tree, caplog):
    coco_tree.image(1)
    coco_tree.object(1, 2, (1, 1, 5, 5))
    coco_tree.write()
    coco_tree.start("test")
    coco_tree.categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    coco_tree.image(5)
    coco_tree.object(5, 1, (1, 1, 5, 5))
    coco_tree.object(5, 2, (1, 1, 6, 6))
    coco_tree.write()
    root = str(coco_tree.root)
    data = Data(root=root, source="coco", train_split="train", test_split="test", classes=())
    index = load_split(data, "test")
    assert index.classes == ("cat", "dog", "bus")
    assert index.labels.tolist() == [1]
    assert "categories lack, without objects: 2 (cat; bus)" in caplog.text
    assert "(cow 1)" in caplog.text
