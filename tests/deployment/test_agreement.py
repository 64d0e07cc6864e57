import pytest
import torch

from tinydet.config import Model
from tinydet.deployment.agreement import compare_detections
from tinydet.yolof.decode import Detections

_CONFIG = Model(score_threshold=0.05, nms_iou=0.6, max_detections=3)


def _found(*rows):
    """Rows of (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return [Detections(table[:, :4], table[:, 4], table[:, 5].long())]


_A = (0, 0, 10, 10, 0.9, 0)
_B = (20, 20, 30, 30, 0.5, 1)


def test_same__order_of_equal_scores_does_not_matter():
    agreement = compare_detections(_found(_A, _B), _found(_B, _A), _CONFIG)
    assert (agreement.matched, agreement.ties, agreement.unmatched) == (2, 0, 0)
    assert agreement.same


def test_same__differences_are_reported():
    near = (0, 0, 10, 10.03, 0.90005, 0)
    agreement = compare_detections(_found(_A), _found(near), _CONFIG)
    assert agreement.same
    assert agreement.max_box == pytest.approx(0.03, abs=1e-5)
    assert agreement.max_score == pytest.approx(5e-5, abs=1e-6)


@pytest.mark.parametrize(
    "other",
    [(0, 0, 10, 10.1, 0.9, 0), (0, 0, 10, 10, 0.901, 0), (0, 0, 10, 10, 0.9, 1)],
    ids=["box", "score", "label"],
)
def test_different(other):
    agreement = compare_detections(_found(_A), _found(other), _CONFIG)
    assert agreement.unmatched == 2
    assert not agreement.same


def test_different__missing_and_too_many():
    assert not compare_detections(_found(_A, _B), _found(_A), _CONFIG).same
    assert not compare_detections(_found(), _found(_A), _CONFIG).same
    assert not compare_detections(_found(_A), _found(_A, _A), _CONFIG).same


def test_nothing_found_agrees():
    agreement = compare_detections(_found(), _found(), _CONFIG)
    assert agreement.same
    assert agreement.matched == 0


def test_tie__score_at_the_threshold():
    at_limit = (20, 20, 30, 30, 0.050001, 1)
    agreement = compare_detections(_found(_A, at_limit), _found(_A), _CONFIG)
    assert (agreement.ties, agreement.unmatched) == (1, 0)
    assert agreement.same


def test_tie__score_at_the_last_place():
    first = [(0, y, 10, y + 10, 0.9, 0) for y in (0, 20)]
    last_a, last_b = (0, 40, 10, 50, 0.3, 0), (0, 60, 10, 70, 0.3, 0)
    agreement = compare_detections(_found(*first, last_a), _found(*first, last_b), _CONFIG)
    assert (agreement.ties, agreement.unmatched) == (2, 0)
    # With room left on either side there is no last place to fight for.
    roomy = Model(max_detections=4)
    assert not compare_detections(_found(*first, last_a), _found(*first, last_b), roomy).same


def test_tie__overlap_at_the_nms_limit():
    # Width 10 beside width 6 inside it: IoU is exactly 0.6.
    inner = (0, 0, 6, 10, 0.5, 0)
    agreement = compare_detections(_found(_A, inner), _found(_A), _CONFIG)
    assert (agreement.ties, agreement.unmatched) == (1, 0)
    well_inside = (0, 0, 8, 10, 0.5, 0)
    assert not compare_detections(_found(_A, well_inside), _found(_A), _CONFIG).same
    other_class = (0, 0, 6, 10, 0.5, 1)
    assert not compare_detections(_found(_A, other_class), _found(_A), _CONFIG).same


def test_many_ties_are_no_agreement():
    rows = [(0, 20 * i, 10, 20 * i + 10, 0.05, 0) for i in range(10)]
    agreement = compare_detections(_found(*rows), _found(), _CONFIG)
    assert agreement.ties == 10
    assert not agreement.same
