"""Average precision and error analysis of detections, on numpy arrays."""

from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.coco import CocoResult, evaluate_coco
from tinydet.evaluation.metrics import Metrics, evaluate
from tinydet.evaluation.voc import VocResult, evaluate_voc

__all__ = [
    "CocoResult",
    "GroundTruth",
    "ImageDetections",
    "Metrics",
    "VocResult",
    "evaluate",
    "evaluate_coco",
    "evaluate_voc",
]
