"""Whether two forms of a detector find the same objects.

Rounding can turn a near tie the other way: a score next to the threshold, an overlap next to the
NMS limit. Such a detection may be missing on one side; every other one must have its partner.
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
# How near a tie is a tie: score from a limit, and overlap from the NMS limit. Coordinates of
# a batch's boxes are offset by class inside torchvision's NMS, which costs float32 digits.
_SCORE_TIE = 1e-5
_IOU_TIE = 0.01


@dataclass(frozen=True)
class Agreement:
    """The outcome of comparing detections of some images.

    Attributes:
        matched: pairs of equal detections.
        ties: detections without a partner that rounding explains.
        unmatched: detections without a partner that it does not.
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
        """Whether both forms find the same, and ties are as rare as ties are."""
        return self.unmatched == 0 and self.ties <= 2 + 0.05 * self.matched

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
    a: Sequence[Detections], b: Sequence[Detections], config: Model
) -> Agreement:
    """Compare two detectors' results, image by image.

    Args:
        a: detections of one form, in pixels of the network input.
        b: detections of the other, for the same images.
        config: the detector's limits.
    """
    total = Agreement()
    for one, other in zip(a, b, strict=True):
        total = total.merge(_compare_image(_on_cpu(one), _on_cpu(other), config))
    return total


def _on_cpu(found: Detections) -> Detections:
    return Detections(found.boxes.cpu(), found.scores.cpu(), found.labels.cpu())


def _compare_image(a: Detections, b: Detections, config: Model) -> Agreement:
    boxes = (a.boxes[:, None] - b.boxes[None]).abs().amax(dim=-1)  # (N, M)
    scores = (a.scores[:, None] - b.scores[None]).abs()  # (N, M)
    near = (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE)
    near &= a.labels[:, None] == b.labels[None]
    free_b = torch.ones(len(b.scores), dtype=torch.bool)
    lost_a, max_score, max_box = [], 0.0, 0.0
    for i in range(len(a.scores)):
        distance = torch.where(near[i] & free_b, boxes[i], torch.inf)
        if not len(distance) or distance.min() == torch.inf:
            lost_a.append(i)
            continue
        j = int(distance.argmin())
        free_b[j] = False
        max_score = max(max_score, scores[i, j].item())
        max_box = max(max_box, boxes[i, j].item())
    lost_b = free_b.nonzero().flatten().tolist()
    ties = _count_ties(a, lost_a, b, config)
    ties += _count_ties(b, lost_b, a, config)
    lost = len(lost_a) + len(lost_b)
    return Agreement(len(a.scores) - len(lost_a), ties, lost - ties, max_score, max_box)


def _count_ties(found: Detections, lost: list[int], other: Detections, config: Model) -> int:
    """Count the lost detections that one side may rightly have and the other not."""
    ties = 0
    for i in lost:
        score = found.scores[i].item()
        limits = [config.score_threshold]
        for side in (found, other):
            if len(side.scores) == config.max_detections:
                limits.append(side.scores[-1].item())
        # The box that suppresses it on one side and fails to on the other.
        rivals = torch.cat([_rivals(found, i), _rivals(other, None)])
        near_limit = any(abs(score - limit) <= _SCORE_TIE for limit in limits)
        same_label = torch.cat([found.labels, other.labels]) == found.labels[i]
        overlaps = box_iou(found.boxes[i : i + 1], rivals)[0]
        near_nms = ((overlaps - config.nms_iou).abs() <= _IOU_TIE) & same_label
        ties += bool(near_limit or near_nms.any())
    return ties


def _rivals(found: Detections, without: int | None) -> Tensor:
    boxes = found.boxes.clone()
    if without is not None:
        boxes[without] = 0
    return boxes
