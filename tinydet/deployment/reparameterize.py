"""From a trained checkpoint to a folded one that is shown to find the same objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tinydet.deployment.agreement import Agreement, compare_detections
from tinydet.deployment.decoding import (
    MAX_BOX,
    MAX_SCORE,
    largest_differences,
    scores_and_boxes,
)
from tinydet.deployment.images import SampleImages, random_images, sample_images
from tinydet.experiment_file import experiment_from_dict
from tinydet.reparam import FoldReport, fold
from tinydet.training.checkpoint import (
    CheckpointError,
    load_detector,
    read_checkpoint,
    save_checkpoint,
)
from tinydet.yolof.detector import Detector

_CHECK_IMAGES = 8


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
            f"outputs     scores within {self.max_score:.1e} (allowed {MAX_SCORE:.0e}), "
            f"boxes within {self.max_box:.1e} px (allowed {MAX_BOX})",
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
        raw = [scores_and_boxes(form, batch) for form in (detector, folded)]
        score, box = largest_differences(*raw)
        max_score, max_box = max(max_score, score), max(max_box, box)
        found = [form.detect(batch) for form in (detector, folded)]
        agreement = agreement.merge(compare_detections(*found, detector.config, raw))
    if not (max_score <= MAX_SCORE and max_box <= MAX_BOX and agreement.same):
        raise ValueError(
            f"the folded detector differs on {images.source}: scores by {max_score:.1e} (allowed "
            f"{MAX_SCORE:.0e}), boxes by {max_box:.1e} px (allowed {MAX_BOX}); "
            f"{agreement.line()}; nothing was written"
        )
    return max_score, max_box, agreement


def load_folded(source: Path) -> Detector:
    """Rebuild the detector of a checkpoint of either form, and fold it if it is not.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ValueError: the detector cannot be folded.
    """
    detector = load_detector(source)
    if read_checkpoint(source)["form"] == "deploy":
        return detector
    return fold_detector(detector)[0]
