"""Evaluate a detector on a split."""

from __future__ import annotations

import torch

from tinydet.config import ConfigError, Data
from tinydet.data.dataset import DetectionDataset
from tinydet.data.index import Index
from tinydet.data.loader import make_test_loader
from tinydet.evaluation import GroundTruth, ImageDetections, Metrics, evaluate
from tinydet.progress import Progress
from tinydet.training.device import fast_memory_format
from tinydet.training.distributed import all_gather_dict, rank, world_size
from tinydet.training.threads import Threads
from tinydet.yolof.detection_model import DetectionModel


def evaluate_detector(
    detector: DetectionModel, index: Index, data: Data, batch_size: int, device: torch.device
) -> Metrics:
    """Return the metrics of a detector, in float32, on every image of a split."""
    detections = detect_split(detector, index, data, batch_size, device)
    return evaluate(detections, ground_truth(index), index.classes)


def detect_split(
    detector: DetectionModel, index: Index, data: Data, batch_size: int, device: torch.device
) -> list[ImageDetections]:
    """Return the detections of every image of a split, in the index's order, in original pixels.

    Several processes share the images; each returns all detections.
    """
    loader = make_test_loader(
        DetectionDataset(index),
        data,
        batch_size,
        rank=rank(),
        world_size=world_size(),
        device=device,
    )
    found: dict[str, ImageDetections] = {}
    threads = Threads(device)
    own_images = len(range(rank(), len(index), world_size()))
    with Progress("evaluating", own_images, "images") as progress:
        for batch in loader:
            threads.adapt()
            images = batch.to(device).images
            images = images.contiguous(memory_format=fast_memory_format(device))
            results = detector.detect(images, batch.sizes, batch.scales)
            for image_id, result in zip(batch.image_ids, results, strict=True):
                parts = (result.boxes, result.scores, result.labels)
                found[image_id] = ImageDetections(*(part.cpu().numpy() for part in parts))
            progress.advance(len(batch))
    found = all_gather_dict(found)
    return [found[image_id] for image_id in index.image_ids]


def require_objects(index: Index) -> None:
    """Check that detectors can be judged on a split.

    Raises:
        ConfigError: it has no object to find.
    """
    if index.difficult.all():
        raise ConfigError(
            f"{index.root} ({index.split}): its {len(index)} images have no object to find "
            "(difficult ones do not count), so AP50 is undefined; name another data.test_split"
        )


def ground_truth(index: Index) -> list[GroundTruth]:
    """Return the annotated boxes of every image, difficult ones included and marked."""
    truth = []
    for i in range(len(index)):
        objects, coco = index.objects(i), index.coco_truth(i)
        if coco is None:
            truth.append(GroundTruth(*objects))
        else:
            labels, difficult = objects.labels, objects.difficult
            truth.append(GroundTruth(coco.boxes, labels, difficult, coco.crowd, coco.areas))
    return truth
