"""Whether two forms of a detector find the same objects.

Rounding can turn a near tie the other way: a score next to the threshold or to the last
candidate's, an overlap next to the NMS limit, and which of two overlapping boxes of equal score is
first. On a plain picture nearly all scores are such. What follows from a tie may be missing on one
side, if that side's network has it; every other detection must have its partner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from tinydet.config import Model
from tinydet.yolof.decode import Detections

SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE = 0.05  # pixels of the network input
_IOU_TIE = 0.01  # overlaps of boxes of 20 pixels that are off by the tolerance

Raw = tuple[Tensor, Tensor]
"""Scores and boxes of all anchors, before any are selected."""


@dataclass(frozen=True)
class Agreement:
    """The outcome of comparing detections of some images.

    Attributes:
        matched: pairs of equal detections.
        ties: detections without a partner that a near tie explains.
        unmatched: detections without a partner that none does.
        max_score: largest difference of scores in a pair.
        max_box: largest difference of box coordinates in a pair, in pixels.
    """

    matched: int = 0
    ties: int = 0
    unmatched: int = 0
    max_score: float = 0.0
    max_box: float = 0.0

    @property
    def same(self) -> bool:
        """Whether both forms find the same but for near ties."""
        return self.unmatched == 0

    def merge(self, other: Agreement) -> Agreement:
        """Return the outcome for both sets of images."""
        return Agreement(
            self.matched + other.matched,
            self.ties + other.ties,
            self.unmatched + other.unmatched,
            max(self.max_score, other.max_score),
            max(self.max_box, other.max_box),
        )

    def line(self) -> str:
        """Return the outcome as a line of text."""
        return (
            f"{self.matched} detections agree (scores within {self.max_score:.1e}, boxes within "
            f"{self.max_box:.1e} px), {self.ties} near ties, {self.unmatched} differ"
        )


def compare_detections(
    a: Sequence[Detections],
    b: Sequence[Detections],
    config: Model,
    raw: Sequence[Raw] = (),
) -> Agreement:
    """Compare two detectors' results, image by image.

    Args:
        a: detections of one form, in pixels of the network input.
        b: detections of the other, for the same images.
        config: the detector's limits.
        raw: what each of the two selected from, scores (B, A, K) and boxes (B, A, 4), clipped.
            Without it all are taken to be candidates, and equal scores are no excuse.
    """
    total = Agreement()
    for i, found in enumerate(zip(a, b, strict=True)):
        sides = [Detections(x.boxes.cpu(), x.scores.cpu(), x.labels.cpu()) for x in found]
        of_image = [(scores[i].cpu(), boxes[i].cpu()) for scores, boxes in raw]
        total = total.merge(_compare_image(*sides, config, of_image))
    return total


def _compare_image(a: Detections, b: Detections, config: Model, raw: Sequence[Raw]) -> Agreement:
    boxes = (a.boxes[:, None] - b.boxes[None]).abs().amax(dim=-1)  # (N, M)
    scores = (a.scores[:, None] - b.scores[None]).abs()  # (N, M)
    near = (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE)
    near &= a.labels[:, None] == b.labels[None]
    lost_a = torch.zeros(len(a.scores), dtype=torch.bool)
    lost_b = torch.ones(len(b.scores), dtype=torch.bool)
    max_score = max_box = 0.0
    for i in range(len(a.scores)):
        distance = torch.where(near[i] & lost_b, boxes[i], torch.inf)
        if not len(distance) or distance.min() == torch.inf:
            lost_a[i] = True
            continue
        j = int(distance.argmin())
        lost_b[j] = False
        max_score = max(max_score, scores[i, j].item())
        max_box = max(max_box, boxes[i, j].item())
    ties = _count_ties(a, lost_a, b, lost_b, config, raw)
    lost = int(lost_a.sum() + lost_b.sum())
    return Agreement(int((~lost_a).sum()), ties, lost - ties, max_score, max_box)


def _count_ties(
    a: Detections,
    lost_a: Tensor,
    b: Detections,
    lost_b: Tensor,
    config: Model,
    raw: Sequence[Raw],
) -> int:
    """Count the detections that one side may rightly have and the other not.

    Args:
        a: one side's, N.
        lost_a: (N,) bool, which have no partner.
        b: the other side's, M.
        lost_b: (M,) bool.
        config: the detector's limits.
        raw: scores (A, K) and boxes (A, 4) of either side, or none.
    """
    limits = [config.score_threshold]
    if raw and raw[0][0].numel() > config.candidates:
        limits += raw[0][0].flatten().topk(config.candidates).values[-1:].tolist()
    if raw:
        lost_a, lost_b = lost_a & _is_in(a, *raw[1]), lost_b & _is_in(b, *raw[0])
    lost_a, lost_b = lost_a & _has_passed_nms(a, config), lost_b & _has_passed_nms(b, config)
    overlaps = box_iou(a.boxes, b.boxes)  # (N, M)
    overlaps = torch.where(a.labels[:, None] == b.labels[None], overlaps, 0)
    near_limit = (overlaps - config.nms_iou).abs() <= _IOU_TIE
    over = overlaps > config.nms_iou
    ahead = a.scores[:, None] - b.scores[None]  # (N, M)
    equal = ahead.abs() <= SCORE_TOLERANCE
    # (N, M): what in b may suppress one of a, whatever else is there; and the reverse.
    tied = near_limit | (over & equal & lost_a[:, None] & lost_b[None] & bool(raw))
    by_b = tied & (ahead <= SCORE_TOLERANCE)
    by_a = tied & (ahead >= -SCORE_TOLERANCE)
    ties_a = lost_a & (_at_a_limit(a, b, config, limits) | by_b.any(dim=1))
    ties_b = lost_b & (_at_a_limit(b, a, config, limits) | by_a.any(dim=0))
    # What a tie has put there suppresses others, which lets yet others stay.
    while True:
        before = int(ties_a.sum() + ties_b.sum())
        ties_a |= lost_a & (over & (ahead <= 0) & ties_b[None]).any(dim=1)
        ties_b |= lost_b & (over & (ahead >= 0) & ties_a[:, None]).any(dim=0)
        if int(ties_a.sum() + ties_b.sum()) == before:
            return before


def _is_in(found: Detections, scores: Tensor, boxes: Tensor) -> Tensor:
    """Return (N,) bool: which detections are among scores (A, K) and boxes (A, 4)."""
    near = (found.boxes[:, None] - boxes[None]).abs().amax(dim=-1) <= BOX_TOLERANCE  # (N, A)
    equal = (found.scores[:, None] - scores.T[found.labels]).abs() <= SCORE_TOLERANCE
    return (near & equal).any(dim=1)


def _has_passed_nms(found: Detections, config: Model) -> Tensor:
    """Return (N,) bool: which detections overlap with no other of their class beyond the limit."""
    over = box_iou(found.boxes, found.boxes) > config.nms_iou + _IOU_TIE
    same = found.labels[:, None] == found.labels[None]
    return (over & same).sum(dim=1) <= 1  # Each overlaps with itself.


def _at_a_limit(found: Detections, other: Detections, config: Model, limits: list[float]) -> Tensor:
    """Return (N,) bool: which the other side may lack for their score alone."""
    at_limit = (found.scores[:, None] - torch.tensor(limits)).abs() <= SCORE_TOLERANCE
    if len(other.scores) < config.max_detections:
        return at_limit.any(dim=1)
    no_room = found.scores <= other.scores[-1] + SCORE_TOLERANCE
    return at_limit.any(dim=1) | no_room
