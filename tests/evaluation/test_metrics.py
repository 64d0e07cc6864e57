import json

import numpy as np
import pytest

from tinydet.evaluation import GroundTruth, ImageDetections, evaluate
from tinydet.evaluation.errors import image_errors
from tinydet.evaluation.metrics import UNDEFINED
from tinydet.evaluation.tide import tide
from tinydet.evaluation.tide_table import tide_lines


def metrics():
    """A cat found, a dog missed, no ground truth of a cow."""
    boxes = np.array([[0, 0, 40, 40], [50, 50, 90, 90]], np.float32)
    found = ImageDetections(boxes[:1], np.array([0.9], np.float32), np.array([0]))
    truth = GroundTruth(boxes, np.array([0, 1]), np.array([False, False]))
    return evaluate([found], [truth], ("cat", "dog", "cow"))


def test_numbers_of_a_small_case():
    result = metrics()
    assert (result.ap50, result.ap50_11pt, result.ap) == pytest.approx((0.5, 0.5, 0.5))


def test_dict_is_strict_json_with_null_for_nan():
    values = json.loads(json.dumps(metrics().as_dict(), allow_nan=False))
    assert values["AP50"] == values["AP50_11pt"] == pytest.approx(0.5)
    assert values["AP"] == pytest.approx(0.5)
    assert values["images"] == 1
    assert values["boxes"] == 2
    assert list(values["per_class"]) == ["cat", "dog", "cow"]
    assert values["per_class"]["cat"] == pytest.approx(
        {"AP50": 1.0, "AP50_11pt": 1.0, "AP": 1.0, "boxes": 1}
    )
    assert values["per_class"]["cow"] == {"AP50": None, "AP50_11pt": None, "AP": None, "boxes": 0}
    assert values["AP_small"] is None


def test_a_phrase():
    assert metrics().in_words() == "AP50 50.00 %, AP 50.00 %"


def test_table_names_every_class_and_lines_up():
    lines = metrics().lines()
    assert [line.split()[0] for line in lines] == ["class", "cat", "dog", "cow", "mean", "COCO:"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[1].split()[1:] == ["1", "100.00", "100.00", "100.00"]
    assert lines[3].split()[1:] == ["0", "-", "-", "-"]
    assert lines[4].split()[1:] == ["2", "50.00", "50.00", "50.00"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("found", [0, 2])
@pytest.mark.parametrize("boxes", [0, 2])
def test_without_objects_to_find_all_is_undefined_and_said_so(images, found, boxes):
    squares = np.array([[0, 0, 40, 40], [50, 50, 90, 90]], np.float32)
    detections = [ImageDetections(squares[:found], np.ones(found), np.zeros(found, int))] * images
    truth = [GroundTruth(squares[:boxes], np.zeros(boxes, int), np.ones(boxes, bool))] * images
    result = evaluate(detections, truth, ("cat", "dog"))
    assert np.isnan([result.ap50, result.ap50_11pt, result.ap]).all()
    assert result.in_words() == result.lines()[-1] == f"AP50 and AP {UNDEFINED}"
    assert tide_lines(tide(detections, truth, 2), ("cat", "dog"))[-1] == f"AP50 is {UNDEFINED}"
    assert image_errors(detections, truth, 2) or not images
