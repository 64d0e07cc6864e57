import json

import numpy as np
import pytest

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.tide import KINDS, SIZES, SUMS, tide
from tinydet.evaluation.tide_table import HEADS, tide_as_dict, tide_change_lines, tide_lines

CLASSES = ("cat", "dog")


def _tide(boxes, scores):
    """Detect cats; one of two boxes of 20 x 20 is at the origin."""
    count = len(boxes)
    found = ImageDetections(
        np.array(boxes, float).reshape(-1, 4), np.array(scores), np.zeros(count, int)
    )
    truth = np.array([[0, 0, 20, 20], [100, 0, 120, 20]], float)
    truth = GroundTruth(truth, np.zeros(2, int), np.zeros(2, bool))
    return tide([found], [truth], 2)


HALF = _tide([[0, 0, 20, 20]], [0.9])
WORSE = _tide([[0, 0, 20, 20], [300, 0, 320, 20]], [0.8, 0.9])


def _cells(lines):
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_rows_are_all_sizes_and_classes_in_percent():
    assert list(HEADS) == [*KINDS, *SUMS]
    lines = tide_lines(WORSE, CLASSES)
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[0].split()) == "AP50 cls loc both dup bkg miss all fp all fn"
    cells = _cells(lines[1:])
    assert list(cells) == ["all", *SIZES, *CLASSES]
    # One of two at precision 1/2: 50 % without the false one, or without the missed one.
    expected = ["25.00", "0.00", "0.00", "0.00", "0.00", "25.00", "25.00", "25.00", "25.00"]
    assert cells["all"] == cells["cat"] == expected
    assert cells["small"] == ["-", *expected[1:]]
    assert cells["large"] == ["-", *["0.00"] * 8]
    assert cells["dog"] == ["-"] * 9


def test_changes_are_the_second_less_the_first():
    cells = _cells(tide_change_lines(HALF, WORSE, CLASSES)[1:])
    expected = ["-25.00", *["+0.00"] * 4, "+25.00", "-25.00", "+25.00", "-25.00"]
    assert cells["all"] == cells["cat"] == expected


def test_plain_numbers_are_json_without_nan():
    plain = json.loads(json.dumps(tide_as_dict(WORSE, CLASSES), allow_nan=False))
    assert plain["all"] == pytest.approx(WORSE.lost)
    assert plain["sizes"]["small"]["background"] == 0.25
    assert plain["classes"]["cat"] == plain["all"]
    assert set(plain["classes"]["dog"].values()) == {None}
