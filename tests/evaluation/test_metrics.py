import json

import numpy as np
import pytest

from tinydet.evaluation import GroundTruth, ImageDetections, evaluate


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


def test_table_names_every_class_and_lines_up():
    lines = metrics().lines()
    assert [line.split()[0] for line in lines] == ["class", "cat", "dog", "cow", "mean", "COCO:"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[1].split()[1:] == ["1", "100.00", "100.00", "100.00"]
    assert lines[3].split()[1:] == ["0", "-", "-", "-"]
    assert lines[4].split()[1:] == ["2", "50.00", "50.00", "50.00"]
