"""The index of YOLO sets: by hand, and what the files may get wrong."""

import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from tinydet.config import Data
from tinydet.data.convert import convert
from tinydet.data.dataset import DetectionDataset, load_split
from tinydet.data.yolo import read_index, split_names

HALF = "0 0.5 0.5 0.5 0.5\n"  # of 60x40 pixels: 15,10,45,30


def only_box(yolo_tree, labels, **kwargs):
    """Return the boxes of an image with such labels, and the problems."""
    yolo_tree.image("b", HALF)
    yolo_tree.image("a", labels, **kwargs)
    index = read_index(yolo_tree.root, "train")
    return index.objects(0).boxes.tolist(), index.problems.counts


def test_read_index__by_hand(yolo_tree):
    yolo_tree.image("b", "2 0.25 0.5 0.5 1\n0 0.5 0.25 0.1 0.2\n", size=(50, 80))
    yolo_tree.image("a", "1 0.5 0.5 0.5 0.5")
    yolo_tree.image("c", "1 0.5 0.5 0.5 0.5", split="val")
    index = read_index(yolo_tree.root, "train")
    assert index.classes == ("cat", "dog", "bus")
    assert index.image_ids == ["images/train/a", "images/train/b"]
    assert index.sizes.tolist() == [[40, 60], [80, 50]]
    assert index.offsets.tolist() == [0, 1, 3]
    assert index.labels.tolist() == [1, 2, 0]
    expected = [[15, 10, 45, 30], [0, 0, 25, 80], [22.5, 12, 27.5, 28]]
    np.testing.assert_allclose(index.boxes, expected, atol=1e-5)
    assert not index.difficult.any()
    assert not index.problems
    assert split_names(yolo_tree.root) == ["train", "val"]
    assert DetectionDataset(index)[1].labels.tolist() == [2, 0]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are Unicode")
def test_a_file_name_that_is_not_utf8_is_left_out_and_told(yolo_tree, tmp_path):
    yolo_tree.image("a", HALF)
    folder = os.fsencode(yolo_tree.root / "images" / "train")
    shutil.copy(os.path.join(folder, b"a.jpg"), os.path.join(folder, b"caf\xe9.jpg"))
    index = read_index(yolo_tree.root, "train")
    assert index.image_ids == ["images/train/a"]
    yolo_tree.yaml("train: images/train\nnames: [cat, dog, bus]\n")
    (line,) = index.problems.summary()
    assert line.encode().startswith(b"images with a file name that is not UTF-8, left out: 1 (")
    lines = convert(yolo_tree.root, tmp_path / "voc", "voc")
    assert "train: 1 images, 1 objects" in lines


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.1 0.2 0.4 0.2 0.3 0.9", [6, 8, 24, 36]),  # a triangle
        ("0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5", [6, 4, 54, 36]),  # an oriented box
        ("0\t0.5  0.5 0.5\t0.5 ", [15, 10, 45, 30]),
        ("0.0 5e-1 .5 0.5 0.5", [15, 10, 45, 30]),
        ("0 0.5 0.5 1.000001 1", [0, 0, 60, 40]),  # rounded
        ("0 0.9 0.5 0.5 0.5", [39, 10, 60, 30]),  # over the right edge: clipped
    ],
)
def test_lines_that_are_boxes(yolo_tree, line, box):
    boxes, problems = only_box(yolo_tree, line)
    np.testing.assert_allclose(boxes, [box], atol=1e-4)
    assert problems == ({"clipped": 1} if line.startswith("0 0.9") else {})


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("3 0.5 0.5 0.5 0.5", "unknown_category"),
        ("-1 0.5 0.5 0.5 0.5", "unknown_category"),
        ("1.5 0.5 0.5 0.5 0.5", "unknown_category"),
        ("cat 0.5 0.5 0.5 0.5", "unknown_category"),
        ("inf 0.5 0.5 0.5 0.5", "unknown_category"),
        ("0 50 50 20 20", "bad_box"),  # percent, or pixels
        ("0 0.5 0.5 1.2 0.5", "bad_box"),
        ("0 -0.1 0.5 0.5 0.5", "bad_box"),
        ("0 nan 0.5 0.5 0.5", "bad_box"),
        ("0 0.5 0.5 0.5", "bad_box"),
        ("0", "bad_box"),
        ("0 0.5 0.5 0.5 0.5 0.9", "bad_box"),  # with a confidence: a prediction
        ("0 0.1 0.2 0.4 0.2 0.3 0.9 0.5", "bad_box"),  # an odd number of coordinates
        ("0 0.5,0.5 0.5 0.5 0.5", "bad_box"),
        ("0 0.5 0.5 0 0.5", "zero_area"),
    ],
)
def test_lines_that_are_dropped_and_counted(yolo_tree, line, rule):
    boxes, problems = only_box(yolo_tree, f"{line}\n{HALF}")
    assert boxes == [[15, 10, 45, 30]]
    assert problems == {rule: 1}


def test_of_poses_the_box_in_front_is_read(yolo_tree):
    yolo_tree.yaml("train: images/train\nkpt_shape: [3, 2]\nnames: [cat]\n")
    boxes, problems = only_box(yolo_tree, "0 0.5 0.5 0.5 0.5 0.1 0.1 0.9 0.9 0.5 0.5")
    assert boxes == [[15, 10, 45, 30]]
    assert not problems


@pytest.mark.parametrize(
    ("labels", "count", "rule"),
    [
        (None, 0, "no_labels"),
        ("", 0, None),
        (" \r\n\t\n", 0, None),
        (HALF.replace("\n", "\r\n") * 2, 2, None),
        (HALF.rstrip().encode("utf-8-sig"), 1, None),
        (HALF.encode("utf-16"), 1, None),
    ],
)
def test_label_files_of_any_kind(yolo_tree, labels, count, rule):
    boxes, problems = only_box(yolo_tree, labels)
    assert len(boxes) == count
    assert problems == ({rule: 1} if rule else {})


def test_a_label_file_that_is_no_text_leaves_its_image_out(yolo_tree):
    yolo_tree.image("a", b"0 0.5 \xff\xfe\x00 0.5")
    yolo_tree.image("b", HALF)
    index = read_index(yolo_tree.root, "train")
    assert index.image_ids == ["images/train/b"]
    assert index.problems.counts == {"bad_annotation": 1}


def test_images_that_share_a_label_file_are_used_once(yolo_tree):
    yolo_tree.image("a", HALF, suffix=".png")
    yolo_tree.image("a", suffix=".jpg")
    yolo_tree.image("a b", HALF)
    index = read_index(yolo_tree.root, "train")
    assert index.image_ids == ["images/train/a b", "images/train/a"]
    assert index.problems.counts == {"same_labels": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_of_the_image_as_viewers_show_it(yolo_tree, orientation):
    yolo_tree.image("a", "0 0.25 0.25 0.5 0.5", orientation=orientation)
    sample = DetectionDataset(read_index(yolo_tree.root, "train"))[0]
    with Image.open(yolo_tree.root / "images" / "train" / "a.jpg") as image:
        viewed = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), viewed)
    height, width = viewed.shape[:2]
    np.testing.assert_allclose(sample.boxes[0], [0, 0, width / 2, height / 2])


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("names: {0: cat, 2: bus, 1: dog}", ("cat", "dog", "bus")),
        ("names:\n  0: cat\n  1: 7\n", ("cat", "7")),
        ("names: [cat, cat]", ("cat",)),
        ("names: [yes, no, 007, 1.50, 2024-01-01]", ("yes", "no", "007", "1.50", "2024-01-01")),
        ("nc: 2", ("class 0", "class 1")),
        ("nc: 1\nnames: ['猫']", ("猫",)),
    ],
)
def test_class_names_in_every_form(yolo_tree, text, classes):
    yolo_tree.yaml(f"train: images/train\n{text}\n")
    yolo_tree.image("a", HALF)
    assert read_index(yolo_tree.root, "train").classes == classes


@pytest.mark.parametrize(
    "text",
    [
        "train: images/train\nval: images/val",
        "path: .\ntrain: images/train\nval: images/val",
        "path: /home/someone/datasets/pets\ntrain: images/train\nval: images/val",
        "path: ../datasets/yolo\ntrain: images/train\nval: images/val",
        "train: ../images/train\nval: ../images/val",  # Roboflow's
        "train: [images/train]\nval: [images/val]\ntest:",
        "path: {root}\ntrain: images/train\nval: images/val\ntest: images/none",
        "train: {root}/images/train\nval: {root}/images/val",
        "train: images\\train\nval: images\\val",
    ],
)
def test_places_in_every_form(yolo_tree, text):
    yolo_tree.yaml(text.format(root=yolo_tree.root) + "\nnames: [cat]\n")
    yolo_tree.image("a", HALF)
    yolo_tree.image("b", HALF, split="val")
    assert split_names(yolo_tree.root) == ["train", "val"]
    for split, name in (("train", "a"), ("val", "b")):
        index = read_index(yolo_tree.root, split)
        assert index.image_ids == [f"images/{split}/{name}"]
        assert index.boxes.tolist() == [[15, 10, 45, 30]]


def test_roboflow_s_folders(yolo_tree):
    yolo_tree.image("a", HALF)
    for part in ("images", "labels"):
        (yolo_tree.root / "valid").mkdir(exist_ok=True)
        shutil.move(yolo_tree.root / part / "train", yolo_tree.root / "valid" / part)
    yolo_tree.yaml("train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n")
    assert read_index(yolo_tree.root, "val").boxes.tolist() == [[15, 10, 45, 30]]
    with pytest.raises(FileNotFoundError, match=r"train is \.\./train/images, which is not below"):
        read_index(yolo_tree.root, "train")


def test_a_split_as_a_list_of_files(yolo_tree):
    for name in ("a", "b", "c"):
        yolo_tree.image(name, HALF)
    lines = ["./images/train/b.jpg", "images/train/a.jpg", "", "./images/train/b.jpg"]
    (yolo_tree.root / "some.txt").write_text("\r\n".join([*lines, "images/train/x.jpg"]))
    yolo_tree.yaml("train: some.txt\nnames: [cat]\n")
    index = read_index(yolo_tree.root, "train")
    assert index.image_ids == ["images/train/b", "images/train/a"]
    assert index.problems.counts == {"missing_image": 1}


def test_classes_restrict_reorder_and_are_checked(yolo_tree):
    yolo_tree.image("a", "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.2 0.2\n2 0.5 0.5 0.1 0.1\n")
    index = read_index(yolo_tree.root, "train", ("bus", "cat"))
    assert index.labels.tolist() == [1, 0]
    assert index.problems.unknown_classes == {"dog": 1}
    data = Data(root=str(yolo_tree.root), source="yolo", train_split="train", classes=("cta",))
    with pytest.raises(ValueError, match=r"none of the classes cta occurs.* have cat, dog, bus"):
        load_split(data, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no data.yaml"),
        ("a: [", "not YAML"),
        ("- a\n- b", "has no fields"),
        ("train: images/train", "has no names"),
        ("train: images/train\nnames: []", "has no names"),
        ("train: images/train\nnames: {a: cat}", "names has 'a': 'cat'"),
        ("train: images/train\nnames: [cat, null]", "names has 1: None"),
        ("trian: images/train\nnames: [cat]", r"did you mean trian\?"),
        ("train:\nnames: [cat]", "no split train"),
        ("train: images/other\nnames: [cat]", "train is images/other, which is not below"),
        ("train: images/train\nnames: !!python/object:os.system {}", "not YAML"),
    ],
)
def test_a_yaml_that_cannot_be_used_is_one_line(yolo_tree, text, message):
    yolo_tree.image("a", HALF)
    if text is None:
        (yolo_tree.root / "data.yaml").unlink()
    else:
        yolo_tree.yaml(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_index(yolo_tree.root, "train")


def test_the_index_is_read_again_when_a_label_appears(yolo_tree):
    yolo_tree.image("a", HALF)
    yolo_tree.image("b")
    assert len(read_index(yolo_tree.root, "train").labels) == 1
    (yolo_tree.root / "labels" / "train" / "b.txt").write_text(HALF)
    assert len(read_index(yolo_tree.root, "train").labels) == 2
