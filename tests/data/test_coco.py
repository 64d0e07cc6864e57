"""The index of COCO sets: by hand, and what the files may get wrong."""

import json

import numpy as np
import pytest

from tinydet.data.coco import read_index, split_names
from tinydet.data.dataset import DetectionDataset

CAT, BUS, DOG = 2, 90, 7


def test_read_index__by_hand(coco_tree):
    coco_tree.image(20, size=(60, 40))
    coco_tree.image(3, size=(50, 80))
    coco_tree.image(100)
    coco_tree.object(20, BUS, (0, 0, 60, 40), area=123.5)
    coco_tree.object(3, DOG, (10.25, 20.5, 30, 0.75))
    coco_tree.object(20, CAT, (1.5, 2, 3, 4), crowd=1)
    coco_tree.object(3, CAT, (40, 70, 15, 10))  # 5 pixels over the right edge
    index = read_index(coco_tree.write(), "train")
    assert index.classes == ("cat", "dog", "bus")  # ids 2, 7, 90
    assert index.image_ids == ["3", "20", "100"]
    assert index.image_files == [f"train/{n:012d}.jpg" for n in (3, 20, 100)]
    assert index.sizes.tolist() == [[80, 50], [40, 60], [40, 60]]
    assert index.offsets.tolist() == [0, 2, 4, 4]
    assert index.labels.tolist() == [1, 0, 2, 0]
    assert index.boxes.tolist() == [
        [10.25, 20.5, 40.25, 21.25],
        [40, 70, 50, 80],
        [0, 0, 60, 40],
        [1.5, 2, 4.5, 6],
    ]
    assert index.difficult.tolist() == [False, False, False, True]
    assert index.coco.crowd.tolist() == [False, False, False, True]
    assert index.coco.areas.tolist() == [22.5, 150, 123.5, 12]
    assert index.coco.boxes[1].tolist() == [40, 70, 55, 80]
    assert index.coco_truth(0).areas.tolist() == [22.5, 150]
    assert index.problems.counts == {"clipped": 1}
    assert "000000000003.jpg: cat 40,70,15,10 in 50x80" in index.problems.summary()[0]


def test_read_index__memory_is_a_few_numbers_an_object(coco_tree):
    coco_tree.image(1)
    for i in range(1000):
        coco_tree.object(1, CAT, (i % 40, 1, 5, 5))
    index = read_index(coco_tree.write(), "train")
    values = [index.boxes, index.labels, index.difficult, *index.coco]
    assert all(isinstance(v, np.ndarray) and v.dtype != object for v in values)
    assert sum(v.nbytes for v in values) <= 70 * 1000


def test_read_index__classes_restrict_and_reorder(coco_tree):
    coco_tree.image(1)
    for category in (CAT, BUS, DOG, BUS):
        coco_tree.object(1, category, (1, 1, 9, 9 + category / 10))
    coco_tree.image(2)
    coco_tree.object(2, BUS, (1, 1, 9, 9))
    index = read_index(coco_tree.write(), "train", ("dog", "cat"))
    assert index.classes == ("dog", "cat")
    assert index.labels.tolist() == [1, 0]
    assert index.image_ids == ["1", "2"]  # an image without objects of these classes stays
    assert index.problems.unknown_classes == {"bus": 3}


def test_read_index__area_or_crowd_left_out(coco_tree):
    coco_tree.image(1)
    for area in (None, 7, "wide", float("nan")):
        coco_tree.object(1, CAT, (1, 1, 5, 6), area=area)
    del coco_tree.objects[0]["area"], coco_tree.objects[0]["iscrowd"]
    index = read_index(coco_tree.write(), "train")
    assert index.coco.areas.tolist() == [30, 7, 30, 30]
    assert not index.coco.crowd.any()


def test_read_index__objects_dropped(coco_tree):
    coco_tree.image(1, size=(60, 40))
    coco_tree.object(1, CAT, (10, 10, 0, 5))
    coco_tree.object(1, CAT, (10, 10, 5, -5))
    coco_tree.object(1, CAT, (60, 10, 5, 5))  # right of the image
    coco_tree.object(1, CAT, (10, -9, 5, 9))  # above it
    coco_tree.object(1, 4, (1, 1, 5, 5))  # a hole between the category ids
    coco_tree.object(77, CAT, (1, 1, 5, 5))
    coco_tree.object(1, CAT, (1, 1, 59.01, 5))  # a hundredth over the edge: rounding
    for box in ([1, 2, 3], None, "1 2 3 4", [1, 2, "3", 4], [1, 2, float("nan"), 4], [10**400] * 4):
        coco_tree.object(1, CAT, (1, 1, 5, 5))
        coco_tree.objects[-1]["bbox"] = box
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    del coco_tree.objects[-1]["bbox"]
    index = read_index(coco_tree.write(), "train")
    assert index.boxes.tolist() == [[1, 1, 60, 6]]
    assert index.coco.boxes[0].tolist() == pytest.approx([1, 1, 60.01, 6])
    assert index.problems.counts == {
        "unknown_image": 1,
        "unknown_category": 1,
        "bad_box": 7,
        "zero_area": 2,
        "outside": 2,
    }
    lines = "\n".join(index.problems.summary())
    assert len(lines.splitlines()) == 5
    assert "objects of images that the annotation file does not list, dropped: 1 (" in lines
    assert "(object 6: image 77)" in lines
    assert "objects of a category that the data set does not define, dropped: 1 (" in lines
    assert "boxes without area, dropped: 2 (000000000001.jpg: cat 10,10,0,5; " in lines


def test_read_index__images_left_out(coco_tree, tmp_path):
    for number in range(1, 9):
        coco_tree.image(number)
        coco_tree.object(number, CAT, (1, 1, 5, 5))
    rows = coco_tree.images
    (coco_tree.root / "train" / rows[0]["file_name"]).unlink()
    broken = coco_tree.root / "train" / rows[1]["file_name"]
    broken.write_bytes(broken.read_bytes()[:300])
    del rows[2]["file_name"]
    (tmp_path / "secret.jpg").write_bytes((broken.parent / rows[3]["file_name"]).read_bytes())
    rows[3]["file_name"] = "../../secret.jpg"
    rows[4]["file_name"] = rows[5]["file_name"]  # which of the two owns the file is anyone's guess
    rows.append(dict(rows[7]))  # listed twice
    index = read_index(coco_tree.write(), "train")
    assert index.image_ids == ["5", "7", "8"]
    assert len(index.labels) == 3
    assert index.problems.counts == {
        "missing_image": 2,
        "bad_image": 1,
        "duplicate_id": 2,
        "duplicate_objects": 1,
        "no_file_name": 1,
    }
    lines = "\n".join(index.problems.summary())
    assert "missing image files, images left out: 2 (" in lines
    assert "train/000000000001.jpg" in lines
    assert "images of the annotation file without a file name, left out: 1 (image 3)" in lines
    assert "000000000006.jpg: image 6" in lines


def test_read_index__two_files_of_one_id(coco_tree):
    coco_tree.image(1)
    coco_tree.image(1, file="other.jpg")
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    index = read_index(coco_tree.write(), "train")
    assert (index.image_ids, len(index.labels)) == (["1"], 1)
    assert index.problems.examples == {"duplicate_id": ["other.jpg: image 1"]}


def test_read_index__two_ids_of_one_file(coco_tree):
    coco_tree.image(1)
    coco_tree.images += [coco_tree.images[0] | {"id": 2}, dict(coco_tree.images[0])]
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    coco_tree.object(2, CAT, (9, 9, 5, 5))
    index = read_index(coco_tree.write(), "train")
    assert (index.image_ids, index.boxes.tolist()) == (["1"], [[1, 1, 6, 6]])
    assert index.problems.counts == {"duplicate_id": 2, "duplicate_objects": 1}
    assert index.problems.examples["duplicate_objects"] == ["000000000001.jpg: object 2"]


def test_read_index__size_mode_and_orientation(coco_tree):
    coco_tree.image(1, size=(60, 40), stated=(600, 400))
    coco_tree.image(2, size=(60, 40), stated=(40, 60), orientation=6)
    coco_tree.image(3, size=(60, 40), orientation=6)
    coco_tree.image(4, mode="L")
    coco_tree.image(5)
    del coco_tree.images[-1]["width"]
    for number in range(1, 6):
        coco_tree.object(number, CAT, (1, 1, 100, 100))
    index = read_index(coco_tree.write(), "train")
    assert index.sizes.tolist() == [[40, 60], [60, 40], [40, 60], [40, 60], [40, 60]]
    assert index.boxes[:2].tolist() == [[1, 1, 60, 40], [1, 1, 40, 60]]
    counts = {"wrong_size": 1, "exif_applied": 1, "exif_ignored": 1, "not_rgb": 1, "clipped": 5}
    assert index.problems.counts == counts
    dataset = DetectionDataset(index)
    assert [tuple(dataset[i].image.shape) for i in (1, 3)] == [(3, 60, 40), (3, 40, 60)]


def test_read_index__images_in_folders_below(coco_tree):
    (coco_tree.root / "train" / "north").mkdir()
    coco_tree.image(1, file="north/a.jpg")
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    index = read_index(coco_tree.write(), "train")
    assert index.image_path(0) == coco_tree.root / "train/north/a.jpg"


def test_read_index__cached_until_something_changes(coco_tree, monkeypatch):
    coco_tree.image(1)
    coco_tree.object(1, CAT, (1, 1, 5, 5), area=9)
    coco_tree.object(1, DOG, (1, 1, 50, 50), crowd=1)
    root = coco_tree.write()
    first = read_index(root, "train")

    def refuse(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("tinydet.data.coco._read_json", refuse)
        again = read_index(root, "train")
        with pytest.raises(AssertionError, match="read again"):
            read_index(root, "train", ("cat",))
    for old, new in zip(first.coco, again.coco, strict=True):
        np.testing.assert_array_equal(old, new)
        assert old.dtype == new.dtype
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert again.image_ids == first.image_ids
    assert again.problems == first.problems

    coco_tree.image(1, size=(30, 30))  # an image file
    assert read_index(root, "train").size(0) == (30, 30)
    coco_tree.object(1, BUS, (2, 2, 5, 5))
    coco_tree.write()
    assert len(read_index(root, "train").labels) == 3


def _one(coco_tree):
    coco_tree.image(1)
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    return json.loads((coco_tree.write() / "annotations/instances_train.json").read_text())


def _without(part, key):
    def change(content):
        del content[part][0][key]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("annotations"), 'has no list "annotations"'),
        (lambda c: c.update(images={}), 'has no list "images"'),
        (_without("images", "id"), "has no 'id'"),
        (_without("annotations", "image_id"), "has no 'image_id'"),
        (_without("annotations", "category_id"), "has no 'category_id'"),
        (_without("categories", "id"), "has no 'id'"),
        (_without("categories", "name"), "no annotated object .* class name.* category 2"),
        (lambda c: c["images"].append("a.jpg"), "malformed"),
        (lambda c: c["annotations"][0].update(image_id=[1]), "malformed"),
        (lambda c: c["images"][0].update(id="one"), "image id 'one' is not a whole number"),
        (lambda c: c["categories"][0].update(id=1.5), "category id 1.5 is not a whole number"),
        (lambda c: c["categories"][0].update(id=DOG), "two categories have the same id"),
        (lambda c: c["images"].clear(), "no usable image"),
        (
            lambda c: c["images"][0].update(file_name="b.jpg"),
            r"no usable image: .*1 .*train/b\.jpg",
        ),
        (lambda c: c["annotations"].clear(), "no annotated object in 1 images"),
    ],
)
def test_read_index__files_that_are_refused(coco_tree, change, says):
    content = _one(coco_tree)
    change(content)
    coco_tree.file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances_train\.json: .*{says}") as error:
        read_index(coco_tree.root, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b'{"images": [', b"", b"\xff\xfe\x00", b"[" * 100_000, b"[1]"])
def test_read_index__not_json(coco_tree, content):
    coco_tree.file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"instances_train\.json: (not JSON|has no list|line 1 is not)"
    ):
        read_index(coco_tree.root, "train")


def test_read_index__none_of_the_classes(coco_tree):
    _one(coco_tree)
    with pytest.raises(ValueError, match=r"none of the classes cow occurs.*have cat"):
        read_index(coco_tree.root, "train", ("cow",))


def test_read_index__what_is_not_there(coco_tree, tmp_path):
    _one(coco_tree)
    root = coco_tree.root
    (root / "annotations/instances_val2017.json").write_text("{}")
    (tmp_path / "bare/annotations").mkdir(parents=True)
    assert split_names(root) == ["train", "val2017"]
    assert split_names(tmp_path) == []
    zips = r"train2017\.zip.*val2017\.zip.*annotations_trainval2017\.zip.*images\.cocodataset\.org"
    for folder, split, says in (
        (tmp_path / "nowhere", "train", f"no such folder.*{zips}"),
        (tmp_path, "train", r"has no annotations; did you mean .*coco\?|bare\?"),
        (root / "train", "train", f"has no annotations; .*{zips}"),
        (root, "val", r"val\.json: no split val; did you mean val2017\? \(there are: train, val"),
        (root, "val2017", f"val2017: no such folder; it holds the images of inst.*{zips}"),
        (tmp_path / "bare", "train", f"there are: none.*{zips}"),
    ):
        with pytest.raises(FileNotFoundError, match=says):
            read_index(folder, split)


def test_read_index__categories_without_a_name(coco_tree):
    coco_tree.image(1)
    for category in (CAT, BUS, DOG):
        coco_tree.object(1, category, (1, 1, 9, 9))
    coco_tree.object(1, 5, (1, 1, 9, 9))
    coco_tree.categories[0]["name"] = " \u200b"
    del coco_tree.categories[1]["name"]
    coco_tree.categories.append({"id": 5, "name": 17})
    index = read_index(coco_tree.write(), "train")
    assert index.classes == ("17", "dog")  # ids 5 and 7
    assert index.labels.tolist() == [1, 0]
    assert index.problems.counts == {"no_class_name": 2}
    assert "000000000001.jpg: category 2" in index.problems.summary()[0]


def test_read_index__categories_of_one_name(coco_tree):
    coco_tree.image(1)
    names = {CAT: "caf\u00e9", BUS: " cafe\u0301", DOG: "dog"}
    for row in coco_tree.categories:
        row["name"] = names[row["id"]]
        coco_tree.object(1, row["id"], (1, 1, 9, 9))
    root = coco_tree.write()
    for classes in ((), ("caf\u00e9", "dog"), ("cafe\u0301", "dog")):
        index = read_index(root, "train", classes)
        assert len(index.classes) == 2
        assert index.labels.tolist() == [0, 0, 1]
        assert index.problems.counts == {"same_name": 1}
    assert "(caf\u00e9: categories 2 and 90)" in index.problems.summary()[0]


def test_read_index__marks_as_they_are_meant(coco_tree):
    coco_tree.image(1)
    values = [1, "1", True, "true", 0, "0", False, "false", None, "maybe", -1]
    for key in ("iscrowd", "ignore"):
        for value in values:
            coco_tree.object(1, CAT, (1, 1, 9, 9), **{key: value})
    index = read_index(coco_tree.write(), "train")
    meant = [True] * 4 + [False] * 7
    assert index.coco.crowd.tolist() == meant + [False] * 11
    assert index.difficult.tolist() == meant + meant
    assert index.problems.counts == {"unclear_mark": 4}
    assert "000000000001.jpg: cat, iscrowd is 'maybe'" in index.problems.summary()[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_read_index__unicode_of_any_kind(coco_tree, encoding):
    coco_tree.image(1)
    coco_tree.object(1, CAT, (1, 1, 9, 9))
    coco_tree.categories[0]["name"] = "猫"
    text = coco_tree.write() / "annotations/instances_train.json"
    text.write_bytes(json.dumps(json.loads(text.read_text()), ensure_ascii=False).encode(encoding))
    assert read_index(coco_tree.root, "train").classes == ("猫", "dog", "bus")


def test_read_index__other_encodings_are_refused(coco_tree):
    coco_tree.file.write_bytes('{\n"é": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"instances_train\.json: line 2 is not UTF-8 .*save"):
        read_index(coco_tree.root, "train")


@pytest.mark.parametrize(
    "name",
    ["./a.jpg", "train/a.jpg", "/data/coco/train/a.jpg", "C:\\coco\\train\\a.jpg", "a.JPG"],
)
def test_read_index__file_names_that_mean_an_image(coco_tree, name):
    coco_tree.image(1, file="a.jpg")
    coco_tree.object(1, CAT, (1, 1, 9, 9))
    coco_tree.images[0]["file_name"] = name
    index = read_index(coco_tree.write(), "train")
    assert index.image_files == ["train/a.jpg"]
    assert not index.problems


def test_read_index__file_names_of_two_unicode_forms(coco_tree):
    coco_tree.image(1, file="cafe\u0301.jpg")
    coco_tree.object(1, CAT, (1, 1, 9, 9))
    coco_tree.images[0]["file_name"] = "caf\u00e9.jpg"
    coco_tree.images.append({"id": 2, "file_name": "cafe\u0301.jpg"})
    index = read_index(coco_tree.write(), "train")
    assert index.image_files == ["train/cafe\u0301.jpg"]
    assert index.problems.counts == {"duplicate_id": 1}


def test_read_index__missing_files_and_what_is_there(coco_tree):
    for number, file in enumerate(("a.jpg", "b.jpg", "c.jpg", "d.jpg")):
        coco_tree.image(number, file=file)
        coco_tree.object(number, CAT, (1, 1, 9, 9))
    names = ("../train/a.jpg", "other/b.jpg", "c.heic", "d.jpg")
    for row, name in zip(coco_tree.images, names, strict=True):
        row["file_name"] = name
    index = read_index(coco_tree.write(), "train")
    assert index.image_files == ["train/d.jpg"]
    assert "train/c.heic: there is train/c.jpg" in index.problems.summary()[0]
    assert index.problems.counts == {"missing_image": 3}


def test_read_index__says_how_far_it_is(coco_tree, every_step_said):
    for number in (1, 2):
        coco_tree.image(number)
        coco_tree.object(number, CAT, (1, 1, 9, 9))
    read_index(coco_tree.write(), "train")
    assert [line.split(", ")[0] for line in every_step_said()] == [
        "checking images: 1/2 images",
        "checking images: 2/2 images",
    ]
