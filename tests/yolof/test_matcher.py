from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.yolof.decode import decode_boxes
from tinydet.yolof.loss import pad_targets
from tinydet.yolof.matcher import BACKGROUND, IGNORED, uniform_match

MODES = ["eval", "train", "extreme", "near_anchor"]


def targets_of(reference, scenario):
    part = reference["head"]["gt"][scenario]
    return [{"boxes": b, "labels": c} for b, c in zip(part["boxes"], part["labels"], strict=True)]


def match(reference, outputs, mode, scenario, **kwargs):
    pred_boxes = decode_boxes(reference["anchors"], outputs(mode)[1], 32)
    boxes, _, valid = pad_targets(targets_of(reference, scenario))
    return uniform_match(reference["anchors"], pred_boxes, boxes, valid, **kwargs)


@pytest.mark.parametrize("scenario", ["tiny_huge_empty", "five_one"])
@pytest.mark.parametrize("mode", MODES)
def test_matches_are_the_reference(reference, outputs, mode, scenario):
    part = reference["head"][mode]["scenarios"][scenario]
    matches = match(reference, outputs, mode, scenario)
    # 0 background, -1 ignored, else 1 + box.
    gt_inds = part["gt_inds"].long()
    expected = torch.where(gt_inds > 0, gt_inds - 1, torch.where(gt_inds < 0, IGNORED, BACKGROUND))
    torch.testing.assert_close(matches.assigned, expected)
    num_boxes = max(len(t["labels"]) for t in targets_of(reference, scenario))
    ranked = matches.anchor_idxs.reshape(2, 4, 2, num_boxes)  # (B, rank, kind, G)
    for i, image in enumerate(part["assign"]):
        count = len(targets_of(reference, scenario)[i]["labels"])
        if count == 0:
            assert not matches.positive[i].any()
            continue
        torch.testing.assert_close(ranked[i, :, 0, :count], image["match_pred"].long())
        torch.testing.assert_close(ranked[i, :, 1, :count], image["match_anchor"].long())
        real = matches.gt_idxs < count
        torch.testing.assert_close(matches.anchor_idxs[i, real], image["match_flat"].long())
        torch.testing.assert_close(matches.positive[i, real], image["box_weight"])
        assert not matches.positive[i, ~real].any()


def test_reference_has_ignored_and_repeated_matches(reference):
    # It never has a prediction ignored for an IoU above 0.7: the slow matcher below covers that.
    ignored = repeated = 0
    for mode in MODES:
        for image in reference["head"][mode]["scenarios"]["five_one"]["assign"]:
            ignored += (~image["box_weight"]).sum()
            repeated += len(image["match_flat"]) - len(image["match_flat"].unique())
    assert ignored > 0
    assert repeated > 0


@pytest.mark.parametrize("mode", MODES)
def test_tied_matches_are_as_near_as_the_reference(reference, outputs, mode):
    """Which of two equally near anchors is taken is ours to choose; how near they are is not."""

    def cxcywh(boxes):
        return torch.cat(
            [(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1
        )

    anchors = reference["anchors"]
    pred_boxes = decode_boxes(anchors, outputs(mode)[1], 32)
    ranked = match(reference, outputs, mode, "ties").anchor_idxs.reshape(2, 4, 2, 3)
    for i, image in enumerate(reference["head"][mode]["scenarios"]["ties"]["assign"]):
        gt = cxcywh(targets_of(reference, "ties")[i]["boxes"])
        candidates = (pred_boxes[i], "match_pred"), (anchors, "match_anchor")
        for kind, (boxes, name) in enumerate(candidates):
            ours, theirs = ranked[i, :, kind, : len(gt)], image[name].long()
            distances = [(cxcywh(boxes)[idxs] - gt).abs().sum(-1) for idxs in (ours, theirs)]
            torch.testing.assert_close(*distances, rtol=1e-5, atol=1e-3)


def iou_of(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0, width) * max(0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return Fraction(overlap, union)


def slow_match(anchors, preds, boxes, topk, pos_ignore, neg_ignore):
    """YOLOF's rules for one image in nested loops, on whole numbers, with exact fractions.

    Returns:
        (anchor, box, counts) of each match in order, and what each anchor is assigned.
    """

    def distance(a, b):  # twice the L1 distance over cx, cy, w, h
        centers = abs(a[0] + a[2] - b[0] - b[2]) + abs(a[1] + a[3] - b[1] - b[3])
        sides = abs(a[2] - a[0] - b[2] + b[0]) + abs(a[3] - a[1] - b[3] + b[1])
        return centers + 2 * sides

    assigned = [BACKGROUND] * len(anchors)
    for a, pred in enumerate(preds):
        if any(iou_of(pred, box) > neg_ignore for box in boxes):
            assigned[a] = IGNORED
    nearest = {}
    for g, box in enumerate(boxes):
        for kind, candidates in enumerate((preds, anchors)):
            order = sorted(range(len(candidates)), key=lambda a: (distance(candidates[a], box), a))
            nearest[kind, g] = order[:topk]
    matches = []
    for rank in range(min(topk, len(anchors))):
        for kind in range(2):
            for g, box in enumerate(boxes):
                a = nearest[kind, g][rank]
                counts = iou_of(anchors[a], box) >= pos_ignore
                matches.append((a, g, counts))
                assigned[a] = g if counts else IGNORED
    return matches, assigned


# A coarse grid: equal distances, equal boxes and IoUs of exactly a threshold are common.
corners = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 5)] * 2)
boxes_strategy = corners.map(lambda c: [c[0], c[1], c[0] + c[2], c[1] + c[3]])


@st.composite
def problems(draw):
    num_anchors = draw(st.integers(1, 9))
    rows = st.lists(boxes_strategy, min_size=num_anchors, max_size=num_anchors)
    images = st.tuples(rows, st.lists(boxes_strategy, max_size=4))
    return draw(rows), draw(st.lists(images, min_size=1, max_size=3))


def check(problem, topk, pos_ignore, neg_ignore):
    anchors, images = problem
    targets = [
        {
            "boxes": torch.tensor(boxes, dtype=torch.float).reshape(-1, 4),
            "labels": torch.zeros(len(boxes), dtype=torch.int64),
        }
        for _, boxes in images
    ]
    gt_boxes, _, valid = pad_targets(targets)
    # Padding must not matter: fill it with a box that would match everything.
    gt_boxes[~valid] = torch.tensor([0.0, 0, 5, 5])
    matches = uniform_match(
        torch.tensor(anchors).float(),
        torch.tensor([preds for preds, _ in images]).float(),
        gt_boxes,
        valid,
        topk,
        float(pos_ignore),
        float(neg_ignore),
    )
    assert matches.assigned.shape == (len(images), len(anchors))
    for i, (preds, boxes) in enumerate(images):
        expected, assigned = slow_match(anchors, preds, boxes, topk, pos_ignore, neg_ignore)
        assert matches.assigned[i].tolist() == assigned
        real = (matches.gt_idxs < len(boxes)).nonzero().flatten().tolist()
        found = [
            (
                matches.anchor_idxs[i, m].item(),
                matches.gt_idxs[m].item(),
                matches.positive[i, m].item(),
            )
            for m in real
        ]
        assert found == expected
        assert matches.positive[i].sum() == sum(counts for _, _, counts in expected)


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([1, 2, 4, 8]))
def test_agrees_with_slow_matcher(problem, topk):
    check(problem, topk, Fraction(15, 100), Fraction(7, 10))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["0", "1/4", "1/2", "1"]), st.sampled_from(["0", "1/4", "1/2"]))
def test_agrees_with_slow_matcher_at_other_thresholds(problem, pos_ignore, neg_ignore):
    check(problem, 2, Fraction(pos_ignore), Fraction(neg_ignore))


def test_anchor_at_exactly_the_positive_threshold_counts():
    # 3 of 20 pixels: IoU 0.15 exactly.
    check(
        ([[0, 0, 3, 1]], [([[9, 9, 10, 10]], [[0, 0, 5, 4]])]), 1, Fraction(3, 20), Fraction(7, 10)
    )


def test_prediction_at_exactly_the_ignore_threshold_is_background():
    # Anchors 1 and 2 are not matched; their predictions cover 70 and 71 of the box's 100 pixels.
    anchors = [[0, 0, 100, 1], [200, 20, 201, 21], [300, 30, 301, 31]]
    preds = [[0, 0, 100, 1], [0, 0, 70, 1], [0, 0, 71, 1]]
    boxes = [[0, 0, 100, 1]]
    assert slow_match(anchors, preds, boxes, 1, Fraction(3, 20), Fraction(7, 10))[1] == [0, -1, -2]
    check((anchors, [(preds, boxes)]), 1, Fraction(3, 20), Fraction(7, 10))
    tensors = [torch.tensor(rows).float() for rows in (anchors, [preds], [boxes])]
    by_default = uniform_match(*tensors, torch.ones(1, 1, dtype=torch.bool), topk=1)
    assert by_default.assigned.tolist() == [[0, BACKGROUND, IGNORED]]


def test_no_boxes_in_the_whole_batch():
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
    boxes, _, valid = pad_targets(
        [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}] * 2
    )
    matches = uniform_match(anchors, anchors.expand(2, -1, -1), boxes, valid)
    assert (matches.assigned == BACKGROUND).all()
    assert matches.anchor_idxs.shape == matches.positive.shape == (2, 0)


def test_matching_takes_no_gradient():
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
    preds = anchors[None].clone().requires_grad_()
    matches = uniform_match(anchors, preds, anchors[None, :1], torch.ones(1, 1, dtype=torch.bool))
    assert not matches.positive.requires_grad
