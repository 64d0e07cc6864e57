"""From a trained checkpoint to a folded one that is shown to find the same objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tinydet.config import experiment_from_dict
from tinydet.deployment.agreement import Agreement, compare_detections
from tinydet.deployment.decoding import clipped_boxes
from tinydet.deployment.images import SampleImages, random_images, sample_images
from tinydet.reparam import FoldReport, fold
from tinydet.training.checkpoint import (
    CheckpointError,
    load_detector,
    read_checkpoint,
    save_checkpoint,
)
from tinydet.yolof.detector import Detector

_CHECK_IMAGES = 8
# Largest differences allowed in float32, before detections are selected: of any score, and of the
# box coordinates, in pixels and clipped to the image, of the best-scored anchors.
_MAX_SCORE = 1e-4
_MAX_BOX = 0.05
_BEST_ANCHORS = 100


@dataclass(frozen=True)
class Reparameterized:
    """What was written, and on what grounds.

    Attributes:
        path: the new checkpoint.
        report: what was folded.
        agreement: the two forms' detections compared.
        max_score: largest difference of any (anchor, class) score.
        max_box: largest difference of a coordinate of the best anchors' boxes, in pixels.
        images: what they were compared on.
    """

    path: Path
    report: FoldReport
    agreement: Agreement
    max_score: float
    max_box: float
    images: str

    def lines(self) -> list[str]:
        """Return the outcome as lines of text."""
        return [
            *self.report.lines(),
            f"checked on  {self.images}",
            f"outputs     scores within {self.max_score:.1e} (allowed {_MAX_SCORE:.0e}), "
            f"boxes within {self.max_box:.1e} px (allowed {_MAX_BOX})",
            f"detections  {self.agreement.line()}",
            f"wrote       {self.path}",
        ]


def reparameterize_checkpoint(source: Path, out: Path | None = None) -> Reparameterized:
    """Fold a trained detector and write it as a checkpoint of form "deploy".

    Args:
        source: a checkpoint of form "training".
        out: where to; `deploy.pt` beside the source by default.

    Raises:
        CheckpointError: the source cannot be used or is folded already.
        ValueError: the folded detector does not find what the source's does; nothing is written.
    """
    content = read_checkpoint(source)
    if content["form"] == "deploy":
        raise CheckpointError(f"{source}: already re-parameterized; give a training checkpoint")
    experiment = experiment_from_dict(content["experiment"])
    detector = load_detector(source)
    folded, report = fold_detector(detector)
    images = sample_images(experiment, _CHECK_IMAGES, 4)
    max_score, max_box, agreement = check_same(detector, folded, images)
    path = out or source.with_name("deploy.pt")
    if path.resolve() == source.resolve():
        raise ValueError(f"--out {path}: is the source checkpoint; name another file")
    save_checkpoint(
        path,
        {
            "form": "deploy",
            "experiment": content["experiment"],
            "classes": content["classes"],
            "model": folded.state_dict(),
            "epoch": content.get("epoch", 0),
        },
    )
    return Reparameterized(path, report, agreement, max_score, max_box, images.source)


def fold_detector(detector: Detector) -> tuple[Detector, FoldReport]:
    """Fold a whole detector in eval mode: backbone, encoder and head."""
    return fold(detector, random_images(1, (64, 64)))


@torch.inference_mode()
def check_same(
    detector: Detector, folded: Detector, images: SampleImages
) -> tuple[float, float, Agreement]:
    """Compare two forms in the precision they have.

    Returns:
        The largest difference of scores, of the best anchors' box coordinates in pixels, and the
        agreement of detections.

    Raises:
        ValueError: one of them is too large.
    """
    max_score = max_box = 0.0
    agreement = Agreement()
    for batch in images.batches:
        found = []
        for form in (detector, folded):
            logits, deltas = form(batch)
            found.append((logits, deltas, form.select(logits, deltas, tuple(batch.shape[-2:]))))
        scores, boxes = _largest(detector, tuple(batch.shape[-2:]), found[0][:2], found[1][:2])
        max_score, max_box = max(max_score, scores), max(max_box, boxes)
        agreement = agreement.merge(compare_detections(found[0][2], found[1][2], detector.config))
    if not (max_score <= _MAX_SCORE and max_box <= _MAX_BOX and agreement.same):
        raise ValueError(
            f"the folded detector differs on {images.source}: scores by {max_score:.1e} (allowed "
            f"{_MAX_SCORE:.0e}), boxes by {max_box:.1e} px (allowed {_MAX_BOX}); "
            f"{agreement.line()}; nothing was written"
        )
    return max_score, max_box, agreement


def _largest(
    detector: Detector,
    image_size: tuple[int, int],
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
) -> tuple[float, float]:
    scores_a, scores_b = a[0].sigmoid(), b[0].sigmoid()  # (B, A, K)
    best = scores_a.amax(dim=-1)
    best = best.topk(min(_BEST_ANCHORS, best.shape[1]), dim=1).indices  # (B, 100)
    rows = torch.arange(len(best))[:, None]
    boxes_a, boxes_b = (clipped_boxes(detector, x[1], image_size)[rows, best] for x in (a, b))
    # NaN is larger than anything allowed: max() of Python would lose it.
    worst = [(scores_a - scores_b).abs().max(), (boxes_a - boxes_b).abs().max()]
    score, box = (torch.nan_to_num(x, nan=torch.inf).item() for x in worst)
    return score, box
