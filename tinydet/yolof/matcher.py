"""YOLOF's uniform matching: every box gets the same number of positives, whatever its size.

B images, A anchors, G boxes per image at most (padded), k nearest anchors, M = 2 * k * G matches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor
from torchvision.ops import box_convert, box_iou

BACKGROUND = -1
IGNORED = -2


@dataclass
class Matches:
    """The assignment of anchors to ground-truth boxes.

    Attributes:
        anchor_idxs: (B, M) int64, the matched anchors; an anchor may occur several times.
        gt_idxs: (M,) int64, the box of each match, the same for every image.
        positive: (B, M) bool, matches with a real box (not padding) whose IoU with the *anchor* is
            high enough.
        assigned: (B, A) int64, for each anchor the index of its box, BACKGROUND or IGNORED.
    """

    anchor_idxs: Tensor
    gt_idxs: Tensor
    positive: Tensor
    assigned: Tensor


@torch.no_grad()
def uniform_match(
    anchors: Tensor,
    pred_boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    topk: int = 4,
    pos_ignore: float = 0.15,
    neg_ignore: float = 0.7,
) -> Matches:
    """Match each box to its `topk` nearest predictions and `topk` nearest anchors by L1 distance.

    The distance is L1 over (cx, cy, w, h) in pixels; of equal distances the lower index wins.
    Anchors start as background; those whose *prediction* has an IoU above `neg_ignore` with a box
    are ignored. Matches then overwrite this, rank by rank, predictions before anchors, box by box;
    the last one wins. A match assigns its box, or "ignored" if the *anchor's* IoU with the box is
    below `pos_ignore`. Source: arXiv 2103.09460, section 4, and its reference code.

    Args:
        anchors: (A, 4) xyxy pixels.
        pred_boxes: (B, A, 4) xyxy pixels.
        gt_boxes: (B, G, 4) xyxy pixels, with any padding.
        gt_valid: (B, G) bool, False for padding.
        topk: number of nearest predictions and of nearest anchors, at most A.
        pos_ignore: lowest IoU of a positive anchor with its box.
        neg_ignore: highest IoU of a background prediction with a box.
    """
    num_images, num_anchors = pred_boxes.shape[:2]
    num_boxes = gt_boxes.shape[1]
    if num_boxes == 0:
        empty = torch.zeros(num_images, 0, dtype=torch.int64, device=anchors.device)
        background = empty.new_full((num_images, num_anchors), BACKGROUND)
        return Matches(empty, empty.new_zeros(0), empty.bool(), background)
    topk = min(topk, num_anchors)

    gt_cxcywh = box_convert(gt_boxes, "xyxy", "cxcywh")
    nearest_preds = _nearest(box_convert(pred_boxes, "xyxy", "cxcywh"), gt_cxcywh, topk)
    nearest_anchors = _nearest(
        box_convert(anchors, "xyxy", "cxcywh").expand(num_images, -1, -1), gt_cxcywh, topk
    )  # (B, topk, G)
    # By rank, predictions first: the order in which the reference writes.
    anchor_idxs = rearrange([nearest_preds, nearest_anchors], "kind b k g -> b (k kind g)")
    gt_idxs = repeat(
        torch.arange(num_boxes, device=anchors.device), "g -> (k kind g)", k=topk, kind=2
    )

    pred_iou = box_iou(pred_boxes, gt_boxes).masked_fill(~gt_valid[:, None], 0)  # (B, A, G)
    assigned = torch.full_like(pred_iou[..., 0], BACKGROUND, dtype=torch.int64)
    assigned[pred_iou.amax(dim=2) > neg_ignore] = IGNORED

    match_iou = _paired_iou(anchors[anchor_idxs], gt_boxes[:, gt_idxs])  # (B, M)
    valid = gt_valid[:, gt_idxs]
    positive = valid & (match_iou >= pos_ignore)
    # The last write wins, independent of the order in which the device scatters.
    # In float32, which is exact up to 2**24 matches: Apple's GPUs have no such maximum of integers.
    write = torch.arange(len(gt_idxs), dtype=torch.float32, device=anchors.device)
    write = write.where(valid, -1)
    last = torch.full_like(assigned, -1, dtype=torch.float32)  # (B, A)
    last = last.scatter_reduce(1, anchor_idxs, write, "amax").long()
    written = gt_idxs[last].where(positive.gather(1, last.clamp(min=0)), IGNORED)
    assigned = written.where(last >= 0, assigned)
    return Matches(anchor_idxs, gt_idxs, positive, assigned)


def _nearest(candidates: Tensor, boxes: Tensor, topk: int) -> Tensor:
    """Return the (B, topk, G) indices of the (B, A, 4) candidates nearest to (B, G, 4) boxes."""
    distance = torch.cdist(candidates, boxes, p=1)  # (B, A, G)
    ranks = []
    # Ties: topk() is device-dependent, argmin returns the first.
    for _ in range(topk):
        ranks.append(distance.argmin(dim=1, keepdim=True))  # (B, 1, G)
        distance.scatter_(1, ranks[-1], torch.inf)
    return torch.cat(ranks, dim=1)


def _paired_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of (..., 4) xyxy boxes with their counterparts: (...)."""
    overlap = torch.min(boxes1[..., 2:], boxes2[..., 2:]) - torch.max(
        boxes1[..., :2], boxes2[..., :2]
    )
    intersection = overlap.clamp(min=0).prod(dim=-1)
    areas = (boxes1[..., 2:] - boxes1[..., :2]).prod(-1) + (boxes2[..., 2:] - boxes2[..., :2]).prod(
        -1
    )
    return intersection / (areas - intersection)
