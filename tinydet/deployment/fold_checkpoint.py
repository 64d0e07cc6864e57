"""Fold a trained checkpoint into a deploy checkpoint, verified to find the same objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from tinydet.atomic import check_out
from tinydet.config import VOC_CLASSES, Experiment
from tinydet.data.shapes import SHAPES
from tinydet.deployment.agreement import (
    Equivalence,
    compare_detections,
    largest_differences,
    scores_and_boxes,
)
from tinydet.deployment.images import SampleImages, random_images, sample_images
from tinydet.experiment_file import experiment_to_dict
from tinydet.reparam import FoldReport, fold
from tinydet.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_unloaded,
    load_checkpoint,
    save_checkpoint,
)
from tinydet.yolof.detector import Detector

_CHECK_IMAGES = 8
_COCO_CLASSES = 80


@dataclass(frozen=True)
class FoldedCheckpoint:
    """A deploy checkpoint that was written.

    Attributes:
        path: the new checkpoint.
        report: what was folded.
        equivalence: the two forms compared.
        images: what they were compared on.
    """

    path: Path
    report: FoldReport
    equivalence: Equivalence
    images: str

    def lines(self) -> list[str]:
        """Return the outcome as lines of text."""
        return [
            *self.report.lines(),
            f"checked on  {self.images}",
            f"agreement   {self.equivalence.line()}",
            f"wrote       {self.path}",
        ]


def fold_checkpoint(
    source: Path,
    out: Path | None = None,
    experiment: Experiment | None = None,
    overrides: Sequence[str] = (),
) -> FoldedCheckpoint:
    """Fold a trained detector and write it as a checkpoint of form "deploy".

    Args:
        source: a checkpoint of form "training".
        out: the new checkpoint; by default `deploy.pt` beside the source.
        experiment: replaces the stored one, for example where its data set is elsewhere.
        overrides: "a.b=value" for the experiment.

    Raises:
        CheckpointError: the source cannot be used or is folded already.
        ValueError: the folded detector is not equivalent; nothing is written.
    """
    path = out or source.with_name("deploy.pt")
    check_out(out, [source], [".pt"])
    checkpoint = load_checkpoint(source, experiment, overrides=overrides)
    if checkpoint.folded:
        raise CheckpointError(f"{source}: already folded; give a training checkpoint")
    check_out(path, [source])
    folded, report = fold_detector(checkpoint.detector)
    images = sample_images(checkpoint.experiment, _CHECK_IMAGES, 4)
    images.warn_if_random()
    equivalence = check_equivalent(checkpoint.detector, folded, images)
    save_checkpoint(
        path,
        {
            "form": "deploy",
            "experiment": experiment_to_dict(checkpoint.experiment),
            "classes": checkpoint.content["classes"],
            "model": folded.state_dict(),
            "epoch": checkpoint.content.get("epoch", 0),
        },
    )
    return FoldedCheckpoint(path, report, equivalence, images.source)


def fold_detector(detector: Detector) -> tuple[Detector, FoldReport]:
    """Fold a whole detector in eval mode: backbone, encoder and head."""
    folded, report = fold(detector, random_images(1, (64, 64)))
    return cast(Detector, folded), report


def folded_detector(checkpoint: Checkpoint) -> Detector:
    """Return a checkpoint's detector in deploy form, folding it if necessary.

    Raises:
        ValueError: the detector cannot be folded.
    """
    return checkpoint.detector if checkpoint.folded else fold_detector(checkpoint.detector)[0]


@torch.inference_mode()
def check_equivalent(detector: Detector, folded: Detector, images: SampleImages) -> Equivalence:
    """Compare two forms in the precision they have.

    Raises:
        ValueError: they differ by more than rounding.
    """
    found = Equivalence()
    for batch in images.batches:
        raw = [scores_and_boxes(form, batch) for form in (detector, folded)]
        expected, detections = (form.detect(batch) for form in (detector, folded))
        agreement = compare_detections(expected, detections, detector.config, raw)
        found = found.merge(Equivalence(*largest_differences(*raw), agreement))
    if not found.same:
        raise ValueError(
            f"the folded detector differs on {images.source}: {found.line()}; nothing was written"
        )
    return found


def both_forms(experiment: Experiment) -> tuple[Detector, Detector]:
    """Return the detector of an experiment in training and in deploy form, in eval mode.

    Its weights are random: neither its size nor its speed depends on them.

    Args:
        experiment: its data set need not exist; see `assumed_classes`.

    Raises:
        ConfigError: the backbone cannot be built as configured.
        ValueError: the detector cannot be folded.
    """
    training = build_unloaded(experiment.model, assumed_classes(experiment)).eval()
    return training, fold_detector(training)[0]


def assumed_classes(experiment: Experiment) -> tuple[str, ...]:
    """Return the experiment's classes, or a stand-in where they would come from its data set.

    The stand-ins are the synthetic set's shapes, as many names as COCO has classes, and VOC's
    classes for any other data.
    """
    stand_ins = {"shapes": SHAPES, "coco": tuple(f"class {i}" for i in range(_COCO_CLASSES))}
    return experiment.data.classes or stand_ins.get(experiment.data.source, VOC_CLASSES)
