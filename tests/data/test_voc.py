import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tinydet.data.dataset import DetectionDataset
from tinydet.data.voc import read_index, split_names


def test_read_index__coordinates_are_one_based_and_inclusive(tree):
    # The whole 60 x 40 image, and the single row of pixels 11 to 20 in columns 1 and 2.
    tree.add("a", [("cat", (1, 1, 60, 40)), ("dog", (1, 11, 2, 20), True)])
    index = read_index(tree.split("a"), "train")
    boxes, labels, difficult = index.objects(0)
    assert boxes.tolist() == [[0, 0, 60, 40], [0, 10, 2, 20]]
    assert labels.tolist() == [0, 1]
    assert difficult.tolist() == [False, True]
    assert index.classes == ("cat", "dog")
    assert index.size(0) == (40, 60)
    assert not index.problems


def test_read_index__classes_give_the_labels(tree):
    tree.add("a", [("cat", (1, 1, 9, 9)), ("dog", (1, 1, 8, 8)), ("Cat ", (2, 2, 5, 5))])
    index = read_index(tree.split("a"), "train", ("dog", "bird", "cat"))
    assert index.labels.tolist() == [2, 0]
    assert index.classes == ("dog", "bird", "cat")
    assert index.problems.unknown_classes == {"Cat": 1}
    absent, line = index.problems.summary()
    assert absent == "classes without an object in this split: 1 (bird)"
    assert line == "objects of a class that is not in the list of classes, dropped: 1 (Cat 1)"


def test_read_index__a_misspelt_class_is_told(tree):
    tree.add("a", [("bottle", (1, 1, 9, 9)), ("cat", (1, 1, 8, 8))])
    index = read_index(tree.split("a"), "train", ("botle", "cat"))
    assert index.labels.tolist() == [1]
    assert index.problems.examples["class_without_object"] == ["botle: did you mean bottle?"]


def test_read_index__without_a_home_nothing_is_cached(tree, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TINYDET_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    tree.add("a")
    assert read_index(tree.split("a"), "train").image_ids == ["a"]


def test_read_index__box_rules(tree):
    tree.add(
        "a",
        [
            ("cat", (20, 20, 20, 30)),  # no width, as written
            ("cat", (30, 20, 10, 30)),  # corners swapped
            ("cat", (70, 10, 90, 20)),  # right of the image
            ("cat", (-9, 10, 0, 20)),  # left of it
            ("cat", (0, 0, 61, 41)),  # one pixel too far on all sides
            ("cat", ("5.5", "6.25", "1e1", "12")),
            ("cat", ("x", 1, 2, 3)),
            ("cat", ("inf", 1, "inf", 3)),
        ],
    )
    index = read_index(tree.split("a"), "train")
    assert index.boxes.tolist() == [[0, 0, 60, 40], [4.5, 5.25, 10, 12]]
    assert index.problems.counts == {"zero_area": 2, "outside": 2, "clipped": 1, "bad_box": 2}
    assert index.problems.examples["zero_area"][0] == "a: cat 20,20,20,30"
    assert all("a: " in line for line in index.problems.summary())


def test_read_index__stated_size_gives_way_to_the_file(tree):
    tree.add("a", [("cat", (1, 1, 60, 40))], stated=(600, 400))
    tree.add("b", [("cat", (1, 1, 60, 40))], stated=(0, 0))
    tree.image("c")
    tree.annotation("c", [("cat", (1, 1, 60, 40))], stated=None)
    index = read_index(tree.split("a", "b", "c"), "train")
    assert index.sizes.tolist() == [[40, 60]] * 3
    assert index.problems.counts == {"wrong_size": 2}
    assert "a: 600x400, is 60x40" in index.problems.summary()[0]


def test_read_index__files_missing_or_broken(tree):
    for name in "abcdef":
        tree.add(name)
    (tree.root / "JPEGImages/a.jpg").unlink()
    (tree.root / "Annotations/b.xml").unlink()
    (tree.root / "Annotations/c.xml").write_text("<annotation><object>")
    (tree.root / "Annotations/d.xml").write_text(
        '<!DOCTYPE x [<!ENTITY a "aaa">]><annotation>&a;</annotation>'
    )
    whole = (tree.root / "JPEGImages/e.jpg").read_bytes()
    (tree.root / "JPEGImages/e.jpg").write_bytes(whole[: len(whole) // 2])
    index = read_index(tree.split(*"abcdefg"), "train")
    assert index.image_ids == ["f"]
    assert index.problems.counts == {
        "missing_image": 2,
        "missing_annotation": 1,
        "bad_annotation": 2,
        "bad_image": 1,
    }
    assert index.problems.examples["missing_image"] == ["a", "g"]
    assert len(index.problems.summary()) == 4


def test_read_index__exif_orientation_only_where_the_stated_size_calls_for_it(tree):
    tree.add("turned", stated=(40, 60), orientation=6)
    tree.add("stored", stated=(60, 40), orientation=6)
    tree.add("upside-down", orientation=3)
    tree.add("plain", orientation=1)
    index = read_index(tree.split("turned", "stored", "upside-down", "plain"), "train")
    assert index.sizes.tolist() == [[60, 40], [40, 60], [40, 60], [40, 60]]
    assert index.problems.counts == {"exif_applied": 1, "exif_ignored": 2}
    dataset = DetectionDataset(index)
    for i in range(4):
        assert tuple(dataset[i].image.shape[1:]) == index.size(i)


def test_read_index__grey_and_cmyk_become_rgb(tree):
    tree.add("a", mode="L")
    tree.add("b", mode="CMYK")
    index = read_index(tree.split("a", "b"), "train")
    assert index.problems.examples["not_rgb"] == ["a: L", "b: CMYK"]
    assert DetectionDataset(index)[0].image.shape == (3, 40, 60)
    assert DetectionDataset(index)[1].image.shape == (3, 40, 60)


def test_read_index__split_lines(tree):
    for name in ("a", "b", "c", "d", "my photo 1"):
        tree.add(name)
    tree.image("b", suffix=".png")  # a second file of that name: the JPEG is used
    lines = ("a  1", "", "b -1", "   ", "c  0", "d.jpg", "my photo 1", "a", "\tb\t")
    index = read_index(tree.split(*lines), "train")
    assert index.image_ids == ["a", "b", "c", "d", "my photo 1"]
    assert index.image_files[1] == "JPEGImages/b.jpg"
    assert index.problems.counts == {"duplicate_id": 2}
    assert index.problems.examples["duplicate_id"] == ["a", "b"]


def test_split_names__without_the_lists_of_one_class(tree):
    # As VOC 2007 has them, in two of its twenty classes and with its blanks.
    lists = {
        "train": "000012\n000017\n",
        "trainval": "000012\n000017\n000005\n",
        "cat_train": "000012 -1\n000017  1\n",
        "cat_trainval": "000012 -1\n000017  1\n000005  0\n",
        "hard_train": "000012\n",  # names alone
        "part_two": "000012 1\n",  # of no other split
    }
    for name, text in lists.items():
        (tree.root / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    assert split_names(tree.root) == ["hard_train", "part_two", "train", "trainval"]
    with pytest.raises(FileNotFoundError, match="there are: hard_train, part_two, train, trainval"):
        read_index(tree.root, "val")


def test_read_index__names_cannot_lead_out_of_the_folder(tree, tmp_path):
    tree.add("a")
    (tmp_path / "secret.jpg").write_bytes((tree.root / "JPEGImages/a.jpg").read_bytes())
    (tmp_path / "secret.xml").write_bytes((tree.root / "Annotations/a.xml").read_bytes())
    index = read_index(tree.split("a", "../../secret"), "train")
    assert index.image_ids == ["a"]
    assert index.problems.counts == {"missing_image": 1}


def test_read_index__images_without_objects_stay(tree):
    tree.add("a")
    tree.add("b", [])
    index = read_index(tree.split("b", "a"), "train")
    assert index.image_ids == ["b", "a"]
    assert index.objects(0).boxes.shape == (0, 4)
    sample = DetectionDataset(index)[0]
    assert sample.boxes.shape == (0, 4)
    assert sample.labels.dtype == torch.int64


def test_read_index__errors_say_what_to_do(tree, tmp_path):
    tree.add("a")
    tree.split("a", name="trainval")
    tree.split("a", name="test")
    tree.split("", name="nothing")
    cases = [
        (tmp_path / "nowhere", "test", FileNotFoundError, "nowhere: no such folder.*Annotations/"),
        (tree.root, "trainvl", FileNotFoundError, r"trainvl\.txt.*did you mean trainval.*test"),
        (tree.root / "JPEGImages", "test", FileNotFoundError, "has no Annotations"),
        (tmp_path, "test", FileNotFoundError, "has no Annotations.*did you mean .*voc"),
        (tree.root, "nothing", ValueError, "no usable image"),
    ]
    for root, split, error, match in cases:
        with pytest.raises(error, match=match):
            read_index(root, split)
    with pytest.raises(ValueError, match=r"none of the classes dog, bird.*have cat"):
        read_index(tree.root, "test", ("dog", "bird"))


def test_read_index__cached_until_something_changes(tree, cache, monkeypatch):
    tree.add("a")
    tree.add("b", [("cat", (5, 5, 9, 9)), ("dog", (1, 1, 1, 5))])
    root = tree.split("a", "b")
    first = read_index(root, "train")
    assert len(list(cache.iterdir())) == 1

    def refuse(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("tinydet.data.voc.parse_annotation", refuse)
        again = read_index(root, "train")
        for name in ("sizes", "exif_rotated", "offsets", "boxes", "labels", "difficult"):
            np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
            assert getattr(again, name).dtype == getattr(first, name).dtype
        assert again.image_ids == first.image_ids
        assert again.image_files == first.image_files
        assert again.classes == first.classes
        assert again.problems == first.problems
        with pytest.raises(AssertionError, match="read again"):
            read_index(root, "train", ("cat",))

    # An edit that keeps the length; only the time of last change tells.
    path = root / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<xmax>30", "<xmax>31"))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert read_index(root, "train").boxes[0].tolist() == [9, 9, 31, 30]
    # An image file.
    tree.image("a", size=(50, 40))
    assert read_index(root, "train").size(0) == (40, 50)
    # The split.
    tree.split("b")
    assert read_index(root, "train").image_ids == ["b"]
    # An annotation that was missing.
    (root / "Annotations" / "b.xml").rename(root / "b.xml")
    with pytest.raises(ValueError, match="no usable image"):
        read_index(root, "train")
    (root / "b.xml").rename(root / "Annotations" / "b.xml")
    assert read_index(root, "train").image_ids == ["b"]


def test_read_index__damaged_cache_is_ignored(tree, cache):
    tree.add("a")
    root = tree.split("a")
    expected = read_index(root, "train").boxes
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    for data in (b"", b"garbage", whole[:-100], whole[: len(whole) // 2], bytes(broken)):
        file.write_bytes(data)
        np.testing.assert_array_equal(read_index(root, "train").boxes, expected)


def test_read_index__unwritable_cache_is_ignored(tree, cache):
    cache.write_text("a file where the folder should be")
    tree.add("a")
    root = tree.split("a")
    assert len(read_index(root, "train")) == 1
    assert len(read_index(root, "train")) == 1


def test_read_index__bccd(bccd):
    trainval, test = read_index(bccd, "trainval"), read_index(bccd, "test")
    assert (len(trainval), len(test)) == (292, 72)
    assert trainval.classes == ("Platelets", "RBC", "WBC")
    dropped = trainval.problems.counts.get("zero_area", 0), test.problems.counts.get("zero_area", 0)
    assert len(trainval.boxes) + len(test.boxes) + sum(dropped) == 4888
    assert sum(dropped) == 2
    named = " ".join(trainval.problems.summary() + test.problems.summary())
    assert "BloodImage_00343" in named
    assert "BloodImage_00338" in named
    for index in (trainval, test):
        assert (index.boxes[:, 2:] > index.boxes[:, :2]).all()
        assert (index.boxes >= 0).all()
        assert (index.boxes <= [640, 480, 640, 480]).all()


def test_detection_dataset__sample_and_transform(tree):
    tree.add("a", [("cat", (11, 6, 30, 20), True)])
    index = read_index(tree.split("a"), "train")
    sample = DetectionDataset(index)[0]
    assert sample.boxes.tolist() == [[10, 5, 30, 20]]
    assert sample.difficult.tolist() == [True]
    assert (sample.image_id, sample.size, sample.scale) == ("a", (40, 60), (1.0, 1.0))
    sample.boxes.zero_()
    assert index.boxes.any(), "samples must not share memory with the index"
    drawn = DetectionDataset(index, lambda _, generator: torch.rand(3, generator=generator))
    torch.testing.assert_close(drawn[0], drawn[0])


def test_read_index__objects_without_a_class_name(tree):
    for i, name in enumerate(("", "  ", "\u200b", "cat")):
        tree.add(f"{i}", [(name, (1, 1, 9, 9)), ("cat", (1, 1, 9, 9))])
    tree.annotation("3", [])
    text = "<annotation><object><bndbox/></object></annotation>"  # no <name> at all
    (tree.root / "Annotations/3.xml").write_text(text)
    index = read_index(tree.split("0", "1", "2", "3"), "train")
    assert index.classes == ("cat",)
    assert index.labels.tolist() == [0, 0, 0]
    assert index.problems.counts == {"no_class_name": 4}
    tree.annotation("0", [("", (1, 1, 9, 9))])
    with pytest.raises(ValueError, match=r"no annotated object .* class name, dropped: 1 "):
        read_index(tree.split("0"), "train")


def test_read_index__one_class_however_its_name_is_written(tree):
    composed = "caf\u00e9 bar"
    written = [composed, f" {composed}\n", "cafe\u0301 bar", "\ufeffcafe\u0301  bar"]
    tree.add("a", [(name, (1, 1, 9, 9)) for name in written])
    for classes in ((), (composed,), ("cafe\u0301 bar",)):
        index = read_index(tree.split("a"), "train", classes)
        assert index.classes == (classes or (composed,))
        assert index.labels.tolist() == [0] * 4
        assert not index.problems


def test_read_index__difficult_as_it_is_meant(tree):
    words = ["1", "2", "yes", "True", "0", "no", "", "Unspecified", "maybe", "-1"]
    tree.add("a", [("cat", (1, 1, 9, 9))] * len(words))
    path = tree.root / "Annotations/a.xml"
    first, *objects = path.read_text().split("<difficult>0</difficult>")
    for word, rest in zip(words, objects, strict=True):
        first += f"<Difficult>{word}</Difficult>{rest}"
    path.write_text(first)
    index = read_index(tree.split("a"), "train")
    assert index.difficult.tolist() == [True] * 4 + [False] * 6
    assert index.problems.counts == {"unclear_mark": 2}
    assert "a: cat, difficult is 'maybe'; a: cat, difficult is '-1'" in index.problems.summary()[0]


def test_read_index__paths_to_elsewhere_are_not_taken_for_ours(tree):
    tree.add("a")
    tree.add("b")
    lines = ["a", "../JPEGImages/b", "other/b", "JPEGImages/../../b", "..\\JPEGImages\\b.jpg"]
    index = read_index(tree.split(*lines), "train")
    assert index.image_ids == ["a"]
    assert index.problems.counts == {"missing_image": 4}


def test_read_index__suffixes_beside_the_usual(tree):
    tree.add("a", suffix=".jfif")
    tree.add("b", suffix=".GIF", mode="P")
    tree.add("c")
    (tree.root / "JPEGImages/c.jpg").rename(tree.root / "JPEGImages/c.heic")
    (tree.root / "Annotations/a.xml").rename(tree.root / "Annotations/a.XML")
    index = read_index(tree.split("a", "b", "c.heic", "c", "d"), "train")
    assert index.image_files == ["JPEGImages/a.jfif", "JPEGImages/b.GIF"]
    assert index.problems.counts == {"missing_image": 3, "not_rgb": 1}
    told = "c.heic; c: there is c.heic, which is not read; d)"
    assert told in index.problems.summary()[0]


def test_read_index__says_how_far_it_is_unless_cached(tree, every_step_said):
    tree.add("a")
    tree.add("b")
    root = tree.split("a", "b", "gone")
    for _ in range(2):
        read_index(root, "train")
    assert [line.split(", ")[0] for line in every_step_said()] == [
        f"reading annotations: {i}/3 images" for i in (1, 2, 3)
    ]
