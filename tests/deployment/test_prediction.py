import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from tinydet.data.annotation import parse_annotation
from tinydet.data.image import read_image
from tinydet.deployment.prediction import Prediction


@pytest.fixture
def found():
    return Prediction(
        boxes=torch.tensor([[1.5, 2.0, 30.25, 20.0], [0.0, 0.0, 60.0, 40.0]]),
        scores=torch.tensor([0.9, 0.4]),
        labels=torch.tensor([2, 0]),
        classes=("cat", "dog", "bus"),
        image=torch.zeros(3, 40, 60, dtype=torch.uint8),
        file="a.jpg",
    )


def nothing(found):
    return Prediction(
        torch.zeros(0, 4),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
        found.classes,
        found.image,
    )


def test_names_and_number(found):
    assert len(found) == 2
    assert found.names == ["bus", "cat"]
    assert len(nothing(found)) == 0
    assert nothing(found).names == []


def test_it_is_printed_in_one_line(found):
    assert repr(found) == "Prediction(1 bus, 1 cat in a.jpg)"
    assert repr(nothing(found)) == "Prediction(nothing)"


def test_it_is_the_mapping_that_torchvision_returns(found):
    assert dict(found).keys() == {"boxes", "scores", "labels"}
    assert torch.equal(found["boxes"], found.boxes)
    assert "boxes" in found
    assert "masks" not in found
    with pytest.raises(KeyError):
        found["masks"]


def test_supervision_reads_it(found):
    sv = pytest.importorskip("supervision")
    for each in (found, nothing(found)):
        read = sv.Detections.from_transformers(each, id2label=dict(enumerate(each.classes)))
        assert len(read) == len(each)
        np.testing.assert_array_equal(read.xyxy, each.boxes.numpy())
        np.testing.assert_array_equal(read.confidence, each.scores.numpy())
        assert list(read.data["class_name"]) == each.names


def test_pycocotools_reads_its_results(found, tmp_path):
    categories = [{"id": i, "name": name} for i, name in enumerate(found.classes, 1)]
    truth = {"images": [{"id": 7}], "annotations": [], "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    results = COCO(tmp_path / "truth.json").loadRes(found.to_coco(7))
    first, second = results.loadAnns(results.getAnnIds(imgIds=[7]))
    assert first["bbox"] == [1.5, 2.0, 28.75, 18.0]
    assert [a["category_id"] for a in (first, second)] == [3, 1]
    assert first["score"] == pytest.approx(0.9)
    assert found.to_coco(0, {"bus": 6, "cat": 17})[0]["category_id"] == 6


def test_voc_s_annotation_is_read_back(found, tmp_path):
    found.save(tmp_path / "a.xml")
    read = parse_annotation(tmp_path / "a.xml")
    assert read.size == (40, 60)
    assert [item.name for item in read.objects] == ["bus", "cat"]
    assert [item.box for item in read.objects] == [(2.5, 3, 30.25, 20), (1, 1, 60, 40)]


def test_voc_s_boxes_are_a_pixel_at_least_and_within_the_image(found):
    thin = torch.tensor([[12.5, 12.5, 18.75, 12.75], [59.9, 0.0, 60.0, 40.0], [0, 39.5, 0.0, 40.0]])
    labels, scores = torch.tensor([0, 1, 2]), torch.full((3,), 0.5)
    text = Prediction(thin, scores, labels, found.classes, found.image).to_voc()
    values = [[float(n.text) for n in box] for box in ElementTree.fromstring(text).iter("bndbox")]
    assert len(values) == 3
    for (x1, y1, x2, y2), box in zip(values, thin.tolist(), strict=True):
        assert 1 <= x1 <= x2 <= 60
        assert 1 <= y1 <= y2 <= 40
        assert abs(x1 - 1 - box[0]) <= 1
        assert abs(y2 - box[3]) <= 1
    assert values[0][::2] == [13.5, 18.75]  # A side that is long enough stays as it is.


def test_drawings_are_files_and_show_in_notebooks(found, tmp_path):
    found.save(tmp_path / "new" / "a.png")
    drawn = read_image(tmp_path / "new" / "a.png")
    assert torch.equal(drawn, found.draw())
    assert not torch.equal(drawn, found.image)
    assert found._repr_jpeg_().startswith(b"\xff\xd8")
    with pytest.raises(ValueError, match=r"a\.txt: not the name of an image file"):
        found.save(tmp_path / "a.txt")


def test_nothing_found_is_empty_everywhere(found, tmp_path):
    nothing(found).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.getbbox() is None
    assert nothing(found).to_coco() == []
    nothing(found).save(tmp_path / "a.xml")
    assert parse_annotation(tmp_path / "a.xml").objects == []
