"""Data sets in other layouts: nothing that a training reads is lost on the way."""

import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from tinydet.data.convert import convert, turn_boxes
from tinydet.data.dataset import DetectionDataset
from tinydet.data.layouts import LAYOUTS, layout_of
from tinydet.data.voc import read_index

HALF = "0 0.5 0.5 0.5 0.5\n"


def objects_by_name(root, split):
    """Return a split's objects by the images' names: class, box, difficult."""
    index = LAYOUTS[layout_of(root)].read_index(root, split)
    found = {}
    for i, file in enumerate(index.image_files):
        boxes, labels, difficult = index.objects(i)
        names = [index.classes[label] for label in labels]
        name = file.rpartition("/")[2].rpartition(".")[0]
        found[name] = list(zip(names, boxes.tolist(), difficult.tolist(), strict=True))
    return found


def assert_same(one, two, atol=0.0):
    assert one.keys() == two.keys()
    for name, objects in one.items():
        kinds = [(kind, difficult) for kind, _, difficult in objects]
        assert kinds == [(kind, difficult) for kind, _, difficult in two[name]], name
        boxes, others = ([box for _, box, _ in found] for found in (objects, two[name]))
        np.testing.assert_allclose(boxes, others, rtol=0, atol=atol, err_msg=name)


def without_difficult(found):
    return {name: [o for o in objects if not o[2]] for name, objects in found.items()}


@pytest.fixture
def voc(tree):
    for name in ("a", "b", "c"):
        tree.image(name)
    tree.image("wide", size=(61, 33), suffix=".png")
    tree.annotation("a", [("dog", (1, 1, 60, 40)), ("cat", (10.26, 5.5, 20.13, 30.7), 1)])
    tree.annotation("b", [])
    tree.annotation("c", [("cat", (3, 4, 17, 19))])
    tree.annotation("wide", [("dog", (7, 2, 61, 33))], stated=(61, 33))
    tree.split("a", "b", "wide", name="trainval")
    return tree.split("c", name="test")


def test_from_voc_to_coco_and_back_nothing_changes(voc, tmp_path):
    convert(voc, tmp_path / "coco", "coco")
    convert(tmp_path / "coco", tmp_path / "voc2", "voc")
    for split in ("trainval", "test"):
        original = objects_by_name(voc, split)
        assert_same(original, objects_by_name(tmp_path / "coco", split), 1e-5)
        assert_same(original, objects_by_name(tmp_path / "voc2", split), 1e-5)
    for path in (voc / "JPEGImages").iterdir():
        assert (tmp_path / "voc2" / "JPEGImages" / path.name).read_bytes() == path.read_bytes()


def test_coco_files_are_coco_s(voc, tmp_path):
    convert(voc, tmp_path / "coco", "coco")
    coco = COCO(tmp_path / "coco" / "annotations" / "instances_trainval.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["cat", "dog"]
    (whole,) = coco.loadAnns(coco.getAnnIds(areaRng=[2000, 1e9]))
    assert whole["bbox"] == [0, 0, 60, 40]
    assert coco.loadImgs(whole["image_id"])[0]["file_name"] == "a.jpg"


def test_yolo_has_what_it_can_have(voc, tmp_path):
    lines = convert(voc, tmp_path / "yolo", "yolo")
    assert "left out 1 difficult objects, which YOLO cannot mark" in lines
    assert "trainval is now train, which YOLO needs" in lines
    convert(tmp_path / "yolo", tmp_path / "voc2", "voc")
    for old, new in (("trainval", "train"), ("test", "val")):
        original = without_difficult(objects_by_name(voc, old))
        assert_same(original, objects_by_name(tmp_path / "yolo", new), 1e-5)
        assert_same(original, objects_by_name(tmp_path / "voc2", new), 1e-5)
    text = (tmp_path / "yolo" / "labels" / "wide.txt").read_text().split()
    np.testing.assert_allclose([float(t) for t in text], [1, 33.5 / 61, 17 / 33, 55 / 61, 32 / 33])
    assert (tmp_path / "yolo" / "labels" / "b.txt").read_text() == ""


def test_crowds_stay_crowds(coco_tree, tmp_path):
    coco_tree.image(1)
    coco_tree.object(1, 2, (1, 2, 30, 20), crowd=1)
    coco_tree.object(1, 2, (5, 6, 7, 8))
    convert(coco_tree.write(), tmp_path / "out", "coco")
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert [a["iscrowd"] for a in content["annotations"]] == [1, 0]
    assert [a["bbox"] for a in content["annotations"]] == [[1, 2, 30, 20], [5, 6, 7, 8]]


def test_what_voc_would_read_as_empty_is_left_out_and_told(coco_tree, tmp_path):
    coco_tree.image(1)
    coco_tree.object(1, 2, (5, 6, 1, 8))
    coco_tree.object(1, 2, (5, 6, 7, 0.5))
    coco_tree.object(1, 2, (5, 6, 1.25, 8))
    lines = convert(coco_tree.write(), tmp_path / "voc", "voc")
    assert "left out 2 objects of at most 1 pixel, which are empty in VOC's layout" in lines
    assert "train: 1 images, 1 objects" in lines
    index = read_index(tmp_path / "voc", "train")
    assert not index.problems
    assert index.boxes.tolist() == [[5, 6, 6.25, 14]]
    lines = convert(coco_tree.root, tmp_path / "yolo", "yolo")
    assert "train: 1 images, 3 objects" in lines


def test_files_of_the_same_name_are_kept_apart(yolo_tree, tmp_path):
    yolo_tree.image("a", HALF)
    yolo_tree.image("a", "1 0.25 0.25 0.5 0.5\n", split="val", size=(80, 20))
    convert(yolo_tree.root, tmp_path / "voc", "voc")
    assert set(objects_by_name(tmp_path / "voc", "train")) == {"images_train_a"}
    assert objects_by_name(tmp_path / "voc", "val") == {
        "images_val_a": [("dog", [0, 0, 40, 10], False)]
    }


def test_files_that_differ_in_their_endings_alone_are_kept_apart(coco_tree, tmp_path):
    for number, (size, box) in enumerate([((60, 40), (1, 2, 3, 4)), ((50, 30), (5, 6, 7, 8))], 1):
        coco_tree.image(number, size=size)
        coco_tree.object(number, 2, box)
    root = coco_tree.write()
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for row, name in zip(content["images"], ("a.jpg", "a.jpeg"), strict=True):
        (root / "train" / row["file_name"]).rename(root / "train" / name)
        row["file_name"] = name
    file.write_text(json.dumps(content))
    convert(root, tmp_path / "voc", "voc")
    boxes = sorted(box for ((_, box, _),) in objects_by_name(tmp_path / "voc", "train").values())
    assert boxes == [[1, 2, 4, 6], [5, 6, 12, 14]]


def test_an_image_of_two_splits_is_copied_once(tree, tmp_path):
    tree.image("a")
    tree.annotation("a", [("cat", (1, 1, 9, 9))])
    for split in ("train", "trainval"):
        tree.split("a", name=split)
    convert(tree.root, tmp_path / "yolo", "yolo")
    assert [path.name for path in (tmp_path / "yolo" / "images").iterdir()] == ["a.jpg"]
    assert set(objects_by_name(tmp_path / "yolo", "trainval")) == {"a"}


def test_lists_of_one_class_are_no_splits(tree, tmp_path):
    tree.add("a", [("cat", (1, 1, 9, 9))])
    tree.split("a")
    (tree.root / "ImageSets" / "Main" / "cat_train.txt").write_text("a  1\n")
    lines = convert(tree.root, tmp_path / "coco", "coco")
    assert lines[:-1] == ["train: 1 images, 1 objects"]
    assert sorted(p.name for p in (tmp_path / "coco").iterdir()) == ["annotations", "train"]


def corners():
    """A picture whose top left quarter is white, and the box of that."""
    pixels = np.zeros((40, 64, 3), dtype=np.uint8)
    pixels[:16, :24] = 255
    return Image.fromarray(pixels), [0.0, 0.0, 24.0, 16.0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turn_boxes__as_pillow_turns_pixels(orientation):
    image, box = corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    image.getexif()[0x0112] = orientation
    viewed = np.asarray(ImageOps.exif_transpose(image))[..., 0]
    ys, xs = np.nonzero(viewed)
    expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    turned = turn_boxes(np.array([box]), (40, 64), orientation)
    assert turned.tolist() == [expected]
    assert turn_boxes(turned, viewed.shape, orientation, back=True).tolist() == [box]


@pytest.mark.parametrize(
    ("orientation", "layout", "size"),
    list(itertools.product(range(1, 9), ("voc", "coco"), [(64, 40), (40, 40)])),
)
def test_boxes_stay_on_their_objects_whatever_the_camera_s_orientation(
    yolo_tree, tmp_path, orientation, layout, size
):
    yolo_tree.image("a", "0 0.25 0.2 0.5 0.4\n", orientation=orientation, size=size)
    convert(yolo_tree.root, tmp_path / "other", layout)
    convert(tmp_path / "other", tmp_path / "back", "yolo")

    def cut(root):
        """Return the pixels in the box, turned as viewed."""
        index = LAYOUTS[layout_of(root)].read_index(root, "train")
        sample = DetectionDataset(index)[0]
        x1, y1, x2, y2 = sample.boxes[0].round().int().tolist()
        return sample.image[:, y1:y2, x1:x2].numpy()

    original = cut(yolo_tree.root)
    assert np.array_equal(cut(tmp_path / "back"), original)
    # The other layouts refer to the stored pixels: the same ones, perhaps turned.
    assert np.array_equal(np.sort(cut(tmp_path / "other"), axis=None), np.sort(original, axis=None))
    assert_same(
        objects_by_name(yolo_tree.root, "train"), objects_by_name(tmp_path / "back", "train"), 1e-5
    )


def test_what_is_not_usable_is_left_out_and_told(tree, tmp_path):
    tree.image("a")
    tree.annotation("a", [("cat", (1, 1, 9, 9)), ("cat", (5, 5, 5, 5))])
    tree.split("a", "gone")
    lines = convert(tree.root, tmp_path / "coco", "coco")
    assert "train: missing image files, images left out: 1 (gone)" in lines
    assert any(line.startswith("train: boxes without area, dropped: 1 (") for line in lines)
    assert "train: 1 images, 1 objects" in lines


@pytest.mark.parametrize("layout", ["coco", "yolo"])
def test_splits_of_the_same_classes_are_read_once(layout, voc, tmp_path, caplog):
    convert(voc, tmp_path / "a", layout)
    caplog.set_level("INFO", "tinydet.data")
    convert(tmp_path / "a", tmp_path / "b", "voc")
    read = [line for line in caplog.messages if line.startswith("reading")]
    assert len(read) == len(set(read)) > 0


def test_a_folder_that_is_there_is_not_touched(voc, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="is there already"):
        convert(voc, tmp_path / "out", "coco")
    with pytest.raises(FileNotFoundError, match=r"has no ImageSets.* \(VOC\), annotations"):
        convert(tmp_path / "out", tmp_path / "new", "coco")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "data.yaml").write_text("train: images/train\nnames: [cat]\n")
    with pytest.raises(FileNotFoundError, match=r"data\.yaml with folders of images"):
        convert(tmp_path / "none", tmp_path / "new", "coco")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["coco", "yolo"])
def test_bccd_there_and_back(bccd, tmp_path, layout):
    convert(bccd, tmp_path / "there", layout)
    convert(tmp_path / "there", tmp_path / "back", "voc")
    for path in sorted((bccd / "ImageSets" / "Main").glob("*.txt")):
        original = objects_by_name(bccd, path.stem)
        back = objects_by_name(tmp_path / "back", path.stem)
        if layout == "yolo":
            original = without_difficult(original)
        assert_same(original, back, 0 if layout == "coco" else 1e-4)
    for path in sorted((tmp_path / "back" / "Annotations").iterdir())[:20]:
        before = ElementTree.parse(bccd / "Annotations" / path.name).getroot()
        after = ElementTree.parse(path).getroot()
        assert before.findtext("size/width") == after.findtext("size/width")
