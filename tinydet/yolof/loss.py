"""YOLOF's losses: focal loss on every anchor, GIoU loss on every match.

B images, A anchors, K classes, G boxes per image at most, M matches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from tinydet.yolof.matcher import IGNORED, Matches

_EPS = 1e-7  # torchvision's, against division by zero


def pad_targets(targets: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the targets of a batch to the same length.

    Returns:
        boxes (B, G, 4), labels (B, G) int64 and valid (B, G) bool, False for padding.
    """
    boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True)
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
    lengths = torch.tensor([len(t["labels"]) for t in targets])
    valid = torch.arange(labels.shape[1]) < lengths[:, None]
    # Apple's GPUs may copy memory that is freed already.
    return boxes, labels, valid.to(labels.device, non_blocking=labels.device.type != "mps")


def yolof_losses(
    cls_logits: Tensor, pred_boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, matches: Matches
) -> tuple[dict[str, Tensor], Tensor]:
    """Return `loss_cls` and `loss_box`, and the mean number of positives per process.

    Both losses are sums divided by that number; multiply by it to add up several batches.

    `loss_cls` is the focal loss (arXiv 1708.02002, alpha 0.25, gamma 2) over all (anchor, class)
    pairs except those of ignored anchors. `loss_box` is the GIoU loss (arXiv 1902.09630) over all
    positive matches. As in the reference, an anchor matched twice counts twice in `loss_box`, and
    its class is that of the last match. `num_positives` counts anchors, at least one per image.

    Args:
        cls_logits: (B, A, K) float32.
        pred_boxes: (B, A, 4) xyxy pixels, decoded; gradient flows through them.
        gt_boxes: (B, G, 4) xyxy pixels, padded.
        gt_labels: (B, G) int64, padded.
        matches: from `uniform_match`.
    """
    is_positive = matches.assigned >= 0  # (B, A)
    num_positives = is_positive.sum(dim=1).clamp(min=1).sum().float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(num_positives)
        num_positives = num_positives / distributed.get_world_size()

    num_classes = cls_logits.shape[2]
    if gt_labels.shape[1]:
        labels = gt_labels.gather(1, matches.assigned.clamp(min=0))  # (B, A)
    else:
        labels = torch.zeros_like(matches.assigned)
    cls_targets = F.one_hot(labels, num_classes) * is_positive[..., None]  # (B, A, K)
    focal = sigmoid_focal_loss(cls_logits, cls_targets.to(cls_logits.dtype))
    loss_cls = (focal * (matches.assigned != IGNORED)[..., None]).sum()

    # Negative matches get weight 0: with fixed shapes there is no synchronization with the device.
    pred = pred_boxes.gather(1, matches.anchor_idxs[..., None].expand(-1, -1, 4))  # (B, M, 4)
    giou = _giou_loss(pred, gt_boxes[:, matches.gt_idxs])  # (B, M)
    loss_box = giou.where(matches.positive, 0).sum()
    losses = {"loss_cls": loss_cls / num_positives, "loss_box": loss_box / num_positives}
    return losses, num_positives


def _giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - GIoU of (..., 4) xyxy boxes with their counterparts: (...).

    As torchvision's `generalized_box_iou_loss`, which selects the overlapping pairs by boolean
    masks: at each of them the host waits for a GPU.
    """
    overlap = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).relu()
    hull = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    intersection, enclosing = _area(overlap), _area(hull)
    union = _area(a[..., 2:] - a[..., :2]) + _area(b[..., 2:] - b[..., :2]) - intersection
    return 1 - intersection / (union + _EPS) + (enclosing - union) / (enclosing + _EPS)


def _area(sides: Tensor) -> Tensor:
    # Not `prod`: its gradient waits for a GPU too.
    return sides[..., 0] * sides[..., 1]
