import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.config import Model
from tinydet.deployment.agreement import compare_detections
from tinydet.yolof.decode import Detections, postprocess

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


def test_ties_are_no_difference_however_many():
    rows = [(0, 20 * i, 10, 20 * i + 10, 0.05, 0) for i in range(10)]
    agreement = compare_detections(_found(*rows), _found(), _CONFIG)
    assert agreement.ties == 10
    assert agreement.same


def test_tie__which_of_equal_scores_is_first():
    # The boxes of a pair overlap, and a third one overlaps with one of the pair alone.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [0, 0, 10, 18]])
    raw = [(torch.tensor([[[0.9], [0.9], [0.5]]]), boxes[None])] * 2
    first, second, third = (boxes[i : i + 1] for i in range(3))
    a = [Detections(torch.cat([first, third]), torch.tensor([0.9, 0.5]), torch.tensor([0, 0]))]
    b = [Detections(second, torch.tensor([0.9]), torch.tensor([0]))]
    agreement = compare_detections(a, b, _CONFIG, raw)
    assert (agreement.matched, agreement.ties, agreement.unmatched) == (0, 3, 0)
    # Another box is no tie where the other network does not have it ...
    other = [raw[0], (raw[0][0], boxes[None, [1, 1, 2]])]
    assert compare_detections(a, b, _CONFIG, other).unmatched == 3
    # ... nor where its score is not equal, or both are kept.
    lower = [(torch.tensor([[[0.9], [0.8], [0.5]]]), boxes[None])] * 2
    b[0].scores[0] = 0.8
    assert not compare_detections(a, b, _CONFIG, lower).same
    both = [Detections(boxes[:2], torch.tensor([0.9, 0.9]), torch.tensor([0, 0]))]
    one = [Detections(first, torch.tensor([0.9]), torch.tensor([0]))]
    assert not compare_detections(both, one, _CONFIG, raw).same


def test_tie__no_excuse_for_keeping_both_of_equal_scores():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [0, 0, 10, 12]])
    raw = [(torch.full((1, 3, 1), 0.9), boxes[None])] * 2
    labels = torch.tensor([0, 0])
    both = [Detections(boxes[:2], torch.tensor([0.9, 0.9]), labels)]
    third = [Detections(boxes[2:], torch.tensor([0.9]), labels[:1])]
    one = [Detections(boxes[:1], torch.tensor([0.9]), labels[:1])]
    assert compare_detections(one, third, _CONFIG, raw).same
    assert not compare_detections(both, third, _CONFIG, raw).same


def _select(scores, boxes, config):
    found = postprocess(
        scores.logit(),
        boxes,
        (64, 64),
        config.score_threshold,
        config.candidates,
        config.nms_iou,
        config.max_detections,
    )
    return [found]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.sampled_from([10, 60, 1000]),
    st.sampled_from([5, 30, 1000]),
)
def test_rounding_is_no_difference_and_a_missing_box_is_one(seed, classes, candidates, limit):
    torch.manual_seed(seed)
    config = Model(candidates=candidates, max_detections=limit, score_threshold=0.2)
    # A plain picture: a grid of boxes with few scores, the threshold among them.
    corners = 8.0 * torch.cartesian_prod(torch.arange(6), torch.arange(6)).repeat(2, 1)
    sides = torch.tensor([16.0, 20]).repeat_interleave(36)[:, None]
    boxes = torch.cat([corners, corners + sides], dim=1).clamp(0, 64)
    levels = torch.tensor([0.1, 0.2, 0.5, 0.9])
    scores = levels[torch.randint(4, (1, classes))].repeat(72, 1)
    scores[torch.rand(72) < 0.1] = 0.6
    scores[0, 0] = 0.95
    raw = [
        (scores + 1e-6 * torch.randn_like(scores), boxes + 1e-4 * torch.randn_like(boxes))
        for _ in range(2)
    ]
    raw = [(s, b.clamp(0, 64)) for s, b in raw]
    a, b = (_select(*one, config) for one in raw)
    stacked = [(s[None], x[None]) for s, x in raw]
    assert compare_detections(a, b, config, stacked).unmatched == 0
    without_best = Detections(a[0].boxes[1:], a[0].scores[1:], a[0].labels[1:])
    assert not compare_detections(a, [without_best], config, stacked).same
