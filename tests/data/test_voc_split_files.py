"""Lists of images in VOC layout: encodings, lines, and forms of file names."""

import pytest

from tinydet.data.dataset import DetectionDataset
from tinydet.data.voc import read_index


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        *((kind, "façade") for kind in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le")),
        *(("cp1252", "façade"), ("cp850", "façade"), ("cp1251", "кот")),
        ("gb18030", "猫 7"),  # whose bytes are valid UTF-8 too
    ],
)
def test_read_index__split_files_in_other_encodings(tree, encoding, name):
    names = ["plain", name]
    for name in names:
        tree.add(name)
    tree.split(name="train")
    file = tree.root / "ImageSets/Main/train.txt"
    file.write_bytes("".join(f"{name} 1\r\n" for name in names).encode(encoding))
    index = read_index(tree.root, "train")
    assert index.image_ids == names
    assert not index.problems


def test_read_index__split_file_of_no_known_encoding(tree):
    tree.add("a")
    tree.split("a")
    (tree.root / "ImageSets/Main/train.txt").write_bytes(b"a\nfa\xe7ade\n")  # no such image
    with pytest.raises(ValueError, match=r"train\.txt: line 2 is not UTF-8 .*save") as error:
        read_index(tree.root, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        *("a\t1", "a   \t -1", "a.JPEG", "a.png", "./a", "JPEGImages/a", "/x/JPEGImages/./a"),
        *("data/VOC/JPEGImages/a.jpg", "./JPEGImages/a.JPG  1", "JPEGImages\\a.jpg"),
        "C:\\VOC\\JPEGImages\\a.jpg\t0",
    ],
)
def test_read_index__lines_that_mean_an_image(tree, line):
    tree.add("a")
    index = read_index(tree.split(line), "train")
    assert index.image_ids == ["a"]
    assert not index.problems


def test_read_index__unicode_forms_of_file_names(tree):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    tree.add(decomposed)
    tree.image(composed + "2")
    tree.annotation(decomposed + "2", [("cat", (1, 1, 9, 9))])
    index = read_index(tree.split(composed, composed + "2", decomposed), "train")
    assert index.image_ids == [decomposed, composed + "2"]
    assert len(index.labels) == 2
    assert index.problems.counts == {"duplicate_id": 1}
    assert DetectionDataset(index)[0].image.shape == (3, 40, 60)
