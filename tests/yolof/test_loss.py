import pytest
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import generalized_box_iou_loss

from tinydet.yolof.decode import decode_boxes
from tinydet.yolof.loss import _giou_loss, pad_targets, yolof_losses
from tinydet.yolof.matcher import BACKGROUND, IGNORED, Matches, uniform_match

MODES = ["eval", "train", "extreme", "near_anchor"]
SCENARIOS = ["tiny_huge_empty", "five_one"]


def losses_of(reference, cls_logits, deltas, scenario):
    part = reference["head"]["gt"][scenario]
    targets = [
        {"boxes": b, "labels": c} for b, c in zip(part["boxes"], part["labels"], strict=True)
    ]
    gt_boxes, gt_labels, valid = pad_targets(targets)
    pred_boxes = decode_boxes(reference["anchors"], deltas, 32)
    matches = uniform_match(reference["anchors"], pred_boxes, gt_boxes, valid)
    losses, _ = yolof_losses(cls_logits, pred_boxes, gt_boxes, gt_labels, matches)
    return losses, matches


def leaves(outputs, mode):
    return [t.detach().clone().requires_grad_() for t in outputs(mode)]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_normalizer_are_the_reference(reference, outputs, mode, scenario):
    expected = reference["head"][mode]["scenarios"][scenario]
    losses, matches = losses_of(reference, *outputs(mode), scenario)
    positives = (matches.assigned >= 0).sum(1).clamp(min=1).sum()
    assert positives == expected["avg_factor"]
    actual = torch.stack([losses["loss_cls"], losses["loss_box"]])
    torch.testing.assert_close(actual, expected["loss"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_losses_under_ties_are_near_the_reference(reference, outputs, mode):
    # Equally near anchors differ in the predictions they carry, so sums are near and not equal.
    expected = reference["head"][mode]["scenarios"]["ties"]
    losses, matches = losses_of(reference, *outputs(mode), "ties")
    positives = (matches.assigned >= 0).sum(1).clamp(min=1).sum().item()
    assert positives == pytest.approx(expected["avg_factor"], abs=2)
    actual = torch.stack([losses["loss_cls"], losses["loss_box"]]) * positives
    sums = expected["loss"] * expected["avg_factor"]
    torch.testing.assert_close(actual, sums, rtol=0.05, atol=0)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("mode", ["train", "extreme", "near_anchor"])
def test_gradients_are_the_reference(reference, outputs, mode, scenario):
    expected = reference["head"][mode]["scenarios"][scenario]
    cls_logits, deltas = leaves(outputs, mode)
    losses, _ = losses_of(reference, cls_logits, deltas, scenario)
    sum(losses.values()).backward()
    close = {"rtol": 1e-3, "atol": 1e-5}
    by_anchor, by_class = cls_logits.grad.sum(2), cls_logits.grad.sum((0, 1))
    torch.testing.assert_close(by_anchor, expected["grad_cls_anchor_sums"], **close)
    torch.testing.assert_close(by_class, expected["grad_cls_class_sums"], rtol=1e-3, atol=1e-4)
    dense = torch.zeros_like(deltas)
    dense[tuple(expected["grad_deltas_index"].long().T)] = expected["grad_deltas"]
    torch.testing.assert_close(deltas.grad, dense, **close)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("mode", MODES)
def test_every_gradient_is_the_whole_reference(
    reference, whole_reference, outputs, flatten, mode, scenario
):
    expected = whole_reference["head"][mode]["scenarios"][scenario]
    cls_logits, deltas = leaves(outputs, mode)
    losses, _ = losses_of(reference, cls_logits, deltas, scenario)
    sum(losses.values()).backward()
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(cls_logits.grad, flatten(expected["grad_cls_score"], 20), **close)
    torch.testing.assert_close(deltas.grad, flatten(expected["grad_bbox_pred"], 4), **close)


def test_training_step_is_the_reference(head, reference, names):
    expected = reference["head"]["train_step"]
    x = reference["head"]["x"].clone().requires_grad_()
    losses, _ = losses_of(reference, *head.train()(x), "five_one")
    sum(losses.values()).backward()
    actual = torch.stack([losses["loss_cls"], losses["loss_box"]]).detach()
    torch.testing.assert_close(actual, expected["loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad[:1, :, :5], expected["grad_x"], rtol=1e-2, atol=1e-4)
    norms = {name: p.grad.norm().item() for name, p in head.named_parameters()}
    translated = {names["head"](k): v for k, v in expected["grad_norm"].items()}
    assert norms == pytest.approx(translated, rel=1e-3, abs=1e-5)


def matches_of(anchor_idxs, gt_idxs, positive, assigned):
    return Matches(
        torch.tensor(anchor_idxs),
        torch.tensor(gt_idxs),
        torch.tensor(positive),
        torch.tensor(assigned),
    )


def test_losses_worked_by_hand():
    """One box matched by two of four anchors, the second ignored; the third is background."""
    matches = matches_of(
        [[0, 0, 1]], [0, 0, 0], [[True, True, False]], [[0, IGNORED, BACKGROUND, 0]]
    )
    # Sigmoid 1/2 everywhere: focal loss is alpha_t / 4 * log 2 for each (anchor, class).
    cls_logits = torch.zeros(1, 4, 3)
    boxes = torch.tensor([[[0.0, 0, 5, 10], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]])
    gt_boxes, gt_labels = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[2]])
    losses, _ = yolof_losses(cls_logits, boxes, gt_boxes, gt_labels, matches)
    # Two positives: 2 entries of alpha 0.25 and 7 of 0.75 in the three anchors that count.
    focal = (2 * 0.25 + 7 * 0.75) / 4 * 0.6931472 / 2
    assert losses["loss_cls"].item() == pytest.approx(focal, rel=1e-5)
    # GIoU is 0.5 (the hull is the box itself), and anchor 0 is matched twice.
    assert losses["loss_box"].item() == pytest.approx(2 * 0.5 / 2, rel=1e-5)


def test_images_without_boxes_count_one_each_and_train_the_classes():
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    gt_boxes, gt_labels, valid = pad_targets(targets)
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
    deltas = torch.zeros(2, 2, 4, requires_grad=True)
    cls_logits = torch.zeros(2, 2, 3, requires_grad=True)
    pred_boxes = decode_boxes(anchors, deltas, 32)
    matches = uniform_match(anchors, pred_boxes, gt_boxes, valid)
    losses, _ = yolof_losses(cls_logits, pred_boxes, gt_boxes, gt_labels, matches)
    sum(losses.values()).backward()
    assert losses["loss_box"].item() == 0
    assert losses["loss_cls"].item() == pytest.approx(12 * 0.75 / 4 * 0.6931472 / 2, rel=1e-5)
    assert (cls_logits.grad > 0).all()
    assert (deltas.grad == 0).all()


def test_degenerate_prediction_keeps_losses_and_gradients_finite():
    matches = matches_of([[0]], [0], [[True]], [[0]])
    boxes = torch.tensor([[[5.0, 5, 5, 5]]], requires_grad=True)  # sides underflowed to nothing
    box, label = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[0]])
    losses, _ = yolof_losses(torch.zeros(1, 1, 1), boxes, box, label, matches)
    losses["loss_box"].backward()
    assert losses["loss_box"].isfinite()
    assert boxes.grad.isfinite().all()


def test_padding_of_targets_leaves_no_trace(reference, outputs):
    """Losses of a batch are those of its images, weighted by their own normalisers."""
    cls_logits, deltas = outputs("train")
    part = reference["head"]["gt"]["five_one"]
    anchors = reference["anchors"]

    def losses(idxs):
        targets = [{"boxes": part["boxes"][i], "labels": part["labels"][i]} for i in idxs]
        gt_boxes, gt_labels, valid = pad_targets(targets)
        pred_boxes = decode_boxes(anchors, deltas[idxs], 32)
        matches = uniform_match(anchors, pred_boxes, gt_boxes, valid)
        found, num_positives = yolof_losses(
            cls_logits[idxs], pred_boxes, gt_boxes, gt_labels, matches
        )
        assert num_positives == (matches.assigned >= 0).sum()  # every image has some
        return torch.stack(list(found.values())), num_positives

    (both, total), (first, n), (second, m) = losses([0, 1]), losses([0]), losses([1])
    torch.testing.assert_close(both * total, first * n + second * m)


def test_normalizer_is_the_mean_over_processes(monkeypatch, reference, outputs):
    cls_logits, deltas = outputs("train")
    alone, _ = losses_of(reference, cls_logits, deltas, "five_one")

    def all_reduce(tensor):
        tensor += 4  # another process with 4 positives

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    together, matches = losses_of(reference, cls_logits, deltas, "five_one")
    positives = (matches.assigned >= 0).sum().item()
    for name in alone:
        expected = alone[name] * positives / ((positives + 4) / 2)
        torch.testing.assert_close(together[name], expected)


def test_pad_targets_marks_padding():
    boxes = [torch.rand(n, 4) for n in (2, 0, 1)]
    targets = [{"boxes": b, "labels": torch.full((len(b),), 7)} for b in boxes]
    padded, labels, valid = pad_targets(targets)
    assert padded.shape == (3, 2, 4)
    assert valid.tolist() == [[True, True], [False, False], [True, False]]
    torch.testing.assert_close(padded[valid], torch.cat(boxes))
    assert (labels[valid] == 7).all()


def test_giou_and_its_gradient_are_torchvisions():
    generator = torch.Generator().manual_seed(0)
    corners, sides = torch.rand(2, 2, 200, 2, generator=generator, dtype=torch.float64)
    one, two = torch.cat([corners, corners + sides], dim=-1)  # Of pairs, a third are disjoint.
    two[0] = one[0]
    two[1] = one[1] + torch.tensor([2.0, 0.0, 2.0, 0.0])
    boxes = [one.clone().requires_grad_() for _ in range(2)]
    losses = [f(a, two) for f, a in zip((_giou_loss, generalized_box_iou_loss), boxes, strict=True)]
    for loss in losses:
        loss.sum().backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(boxes[0].grad, boxes[1].grad)


@pytest.mark.parametrize("objects", [0, 3])
def test_losses_on_a_gpu_need_no_number_on_the_host(objects):
    """With made-up tensors: a number, or a shape that depends on one, does not exist for them."""
    with FakeTensorMode():
        anchors = torch.empty(50, 4, device="cuda")
        logits, deltas = (torch.empty(2, 50, n, device="cuda") for n in (5, 4))
        target = {
            "boxes": torch.empty(objects, 4, device="cuda"),
            "labels": torch.empty(objects, dtype=torch.int64, device="cuda"),
        }
        gt_boxes, gt_labels, valid = pad_targets([target, target])
        pred_boxes = decode_boxes(anchors, deltas, 32)
        matches = uniform_match(anchors, pred_boxes, gt_boxes, valid)
        losses, _ = yolof_losses(logits, pred_boxes, gt_boxes, gt_labels, matches)
        assert {loss.device.type for loss in losses.values()} == {"cuda"}
