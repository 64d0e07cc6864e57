"""Whether two forms of a detector (unfolded and folded, torch and ONNX) are equivalent.

Scores and boxes of all anchors are compared within a tolerance, and the selected detections one by
one. Rounding can flip a near tie: a score next to the threshold or to the last candidate's, an
overlap next to the NMS limit, the order of two overlapping boxes of equal score. On an image
without texture nearly all scores are ties. A detection that follows from a tie may be missing from
one side, provided that side's network predicts it at all; all other detections must have a match.

B images, A anchors, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchvision.ops import box_iou

from tinydet.config import Model
from tinydet.yolof.decode import Detections, decode_boxes
from tinydet.yolof.detector import Detector

# Largest differences allowed in float32: of any score, and of the box coordinates, in pixels and
# clipped to the image, of the anchors with the best scores. In an untrained YOLOv5, torch's float32
# differs from its own float64 by a hundredth of a pixel.
MAX_SCORE = 1e-4
MAX_BOX = 0.05
_BEST_ANCHORS = 100
_IOU_TIE = 0.01  # how much the IoU of boxes of 20 pixels changes when they move by MAX_BOX

Raw = tuple[Tensor, Tensor]
"""Scores and boxes of all anchors, before selection."""


@dataclass(frozen=True)
class Agreement:
    """How the detections of two forms match.

    Attributes:
        matched: pairs of equal detections.
        ties: detections without a match that a near tie explains.
        unmatched: detections without a match or an explanation.
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
        """Whether the detections are equal except for near ties."""
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


@dataclass(frozen=True)
class Equivalence:
    """How the raw outputs and the detections of two forms differ.

    Attributes:
        max_score: largest difference of any (anchor, class) score.
        max_box: largest difference of a coordinate of the best anchors' boxes, in pixels.
        detections: the detections compared.
    """

    max_score: float = 0.0
    max_box: float = 0.0
    detections: Agreement = field(default_factory=Agreement)

    @property
    def same(self) -> bool:
        """Whether the two forms are equivalent."""
        near = self.max_score <= MAX_SCORE and self.max_box <= MAX_BOX
        return near and self.detections.same

    def merge(self, other: Equivalence) -> Equivalence:
        """Return the outcome for both sets of images."""
        return Equivalence(
            max(self.max_score, other.max_score),
            max(self.max_box, other.max_box),
            self.detections.merge(other.detections),
        )

    def line(self) -> str:
        """Return the outcome as a line of text."""
        return (
            f"scores within {self.max_score:.1e} (allowed {MAX_SCORE:.0e}), boxes within "
            f"{self.max_box:.1e} px (allowed {MAX_BOX}); {self.detections.line()}"
        )


def scores_and_boxes(detector: Detector, images: Tensor) -> Raw:
    """Return scores (B, A, K) in 0..1 and boxes (B, A, 4) xyxy pixels, clipped to the image.

    Clipping before selection is safe, since candidates are chosen by score alone.

    Args:
        detector: in eval mode.
        images: (B, 3, H, W) RGB in 0..255.
    """
    cls_logits, deltas = detector(images)
    height, width = image_size = (images.shape[-2], images.shape[-1])
    boxes = decode_boxes(detector.anchors(image_size), deltas, detector.config.center_clamp)
    x1, y1, x2, y2 = boxes.float().unbind(dim=-1)  # (B, A) each
    columns = (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height))
    return cls_logits.float().sigmoid(), torch.stack(columns, dim=-1)


def largest_differences(a: Raw, b: Raw) -> tuple[float, float]:
    """Compare what two forms of a detector return for the same images.

    Args:
        a: scores and boxes of the reference.
        b: scores and boxes of the other form.

    Returns:
        The largest difference of a score, and of a box coordinate of the reference's best anchors
        in pixels; infinite if a value is NaN.
    """
    best = a[0].amax(dim=-1)  # (B, A)
    best = best.topk(min(_BEST_ANCHORS, best.shape[1]), dim=1).indices  # (B, 100)
    rows = torch.arange(len(best))[:, None]
    worst = [(a[0] - b[0]).abs().max(), (a[1] - b[1])[rows, best].abs().max()]
    # Comparisons and Python's max() would ignore NaN.
    score, box = (torch.nan_to_num(x, nan=torch.inf).item() for x in worst)
    return score, box


def compare_detections(
    a: Sequence[Detections],
    b: Sequence[Detections],
    config: Model,
    raw: Sequence[Raw] = (),
) -> Agreement:
    """Match two detectors' results, image by image.

    Args:
        a: detections of one form, in pixels of the network input.
        b: detections of the other, for the same images.
        config: the detector's limits.
        raw: scores (B, A, K) and clipped boxes (B, A, 4) that each side selected from. Without
            them every prediction counts as a candidate, and equal scores are not treated as ties.
    """
    total = Agreement()
    for i, found in enumerate(zip(a, b, strict=True)):
        one, other = (Detections(x.boxes.cpu(), x.scores.cpu(), x.labels.cpu()) for x in found)
        of_image = [(scores[i].cpu(), boxes[i].cpu()) for scores, boxes in raw]
        total = total.merge(_compare_image(one, other, config, of_image))
    return total


def _compare_image(a: Detections, b: Detections, config: Model, raw: Sequence[Raw]) -> Agreement:
    boxes = (a.boxes[:, None] - b.boxes[None]).abs().amax(dim=-1)  # (N, M)
    scores = (a.scores[:, None] - b.scores[None]).abs()  # (N, M)
    near = (boxes <= MAX_BOX) & (scores <= MAX_SCORE)
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
    """Count the unmatched detections that a near tie explains.

    Args:
        a: one side's, N.
        lost_a: (N,) bool, which have no match.
        b: the other side's, M.
        lost_b: (M,) bool.
        config: the detector's limits.
        raw: scores (A, K) and boxes (A, 4) of each side, or none.
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
    equal = ahead.abs() <= MAX_SCORE
    # (N, M): which of b may suppress which of a, on its own; and the reverse.
    tied = near_limit | (over & equal & lost_a[:, None] & lost_b[None] & bool(raw))
    by_b = tied & (ahead <= MAX_SCORE)
    by_a = tied & (ahead >= -MAX_SCORE)
    ties_a = lost_a & (_at_a_limit(a, b, config, limits) | by_b.any(dim=1))
    ties_b = lost_b & (_at_a_limit(b, a, config, limits) | by_a.any(dim=0))
    # A detection that is there because of a tie suppresses others, which in turn frees others.
    while True:
        before = int(ties_a.sum() + ties_b.sum())
        ties_a |= lost_a & (over & (ahead <= 0) & ties_b[None]).any(dim=1)
        ties_b |= lost_b & (over & (ahead >= 0) & ties_a[:, None]).any(dim=0)
        if int(ties_a.sum() + ties_b.sum()) == before:
            return before


def _is_in(found: Detections, scores: Tensor, boxes: Tensor) -> Tensor:
    """Return (N,) bool: which detections occur in scores (A, K) and boxes (A, 4)."""
    near = (found.boxes[:, None] - boxes[None]).abs().amax(dim=-1) <= MAX_BOX  # (N, A)
    equal = (found.scores[:, None] - scores.T[found.labels]).abs() <= MAX_SCORE
    return (near & equal).any(dim=1)


def _has_passed_nms(found: Detections, config: Model) -> Tensor:
    """Return (N,) bool: which detections overlap no other of their class beyond the NMS limit."""
    over = box_iou(found.boxes, found.boxes) > config.nms_iou + _IOU_TIE
    same = found.labels[:, None] == found.labels[None]
    return (over & same).sum(dim=1) <= 1  # Each overlaps with itself.


def _at_a_limit(found: Detections, other: Detections, config: Model, limits: list[float]) -> Tensor:
    """Return (N,) bool: which the other side may lack because of their score alone."""
    at_limit = (found.scores[:, None] - torch.tensor(limits)).abs() <= MAX_SCORE
    if len(other.scores) < config.max_detections:
        return at_limit.any(dim=1)
    no_room = found.scores <= other.scores[-1] + MAX_SCORE
    return at_limit.any(dim=1) | no_room
