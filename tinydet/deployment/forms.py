"""An experiment's detector in both forms, from its description alone: no data, no weights."""

from __future__ import annotations

from tinydet.config import VOC_CLASSES, Experiment
from tinydet.data.shapes import SHAPES
from tinydet.deployment.reparameterize import fold_detector
from tinydet.training.checkpoint import build_unloaded
from tinydet.yolof.detector import Detector

_COCO_CLASSES = 80


def both_forms(experiment: Experiment) -> tuple[Detector, Detector]:
    """Return the detector of an experiment in training and in deploy form, in eval mode.

    Its weights are random: neither its size nor its speed depends on them.

    Args:
        experiment: its data need not be there; see `assumed_classes`.

    Raises:
        ConfigError: the backbone cannot be built as asked.
        ValueError: the detector cannot be folded.
    """
    training = build_unloaded(experiment.model, assumed_classes(experiment)).eval()
    return training, fold_detector(training)[0]


def assumed_classes(experiment: Experiment) -> tuple[str, ...]:
    """Return the experiment's classes; where it would read them from its data, a stand-in.

    The stand-ins are the shapes of the synthetic set, as many names as COCO has classes, and for
    any other data the classes of VOC.
    """
    stand_ins = {"shapes": SHAPES, "coco": tuple(f"class {i}" for i in range(_COCO_CLASSES))}
    return experiment.data.classes or stand_ins.get(experiment.data.source, VOC_CLASSES)
