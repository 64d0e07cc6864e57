"""COCO sets in training and evaluation, with pycocotools on the same file as reference."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tinydet.config import Augment, Data, Experiment, Model, Optim, Train
from tinydet.data.coco import read_index
from tinydet.data.dataset import DetectionDataset, load_split
from tinydet.data.loader import make_train_loader
from tinydet.evaluation import ImageDetections, evaluate, evaluate_coco
from tinydet.training.evaluate import ground_truth
from tinydet.training.loop import train
from tinydet.yolof.detector import Detector

CAT, BUS, DOG = 2, 90, 7


def random_set(coco_tree, rng):
    """Write a set with all that COCO's evaluation treats in a way of its own; return its images."""
    numbers = rng.permutation(np.arange(1, 60))[:14].tolist()  # not in order
    for number in numbers:
        coco_tree.image(number, size=(320, 320))
    boxes = {}
    for number in numbers[3:]:  # three images are empty
        boxes[number] = []
        for _ in range(rng.integers(1, 7)):
            side = rng.choice([20, 60, 150])
            # Some reach over the edge, where ours are clipped.
            box = [*rng.uniform(-15, 320 - side / 2, 2), *rng.uniform(side / 2, side * 1.5, 2)]
            crowd = int(rng.random() < 0.25)
            category = int(rng.choice([CAT, DOG, BUS]))
            # Masks fill anything from a tenth of their box: other sizes than the boxes'.
            area = box[2] * box[3] * rng.uniform(0.1, 1)
            coco_tree.object(number, category, [float(v) for v in box], float(area), crowd)
            boxes[number].append((category, box, crowd))
    return numbers, boxes


def random_results(rng, numbers, boxes):
    """Return COCO result rows: jittered boxes, parts of crowds, and some in empty images."""
    rows = []

    def add(number, category, box):
        box = [float(v) for v in box]
        score = round(float(rng.random()), 1)  # many are equal: the order of images matters
        rows.append({"image_id": number, "category_id": category, "bbox": box, "score": score})

    for number in numbers:
        for category, (x, y, w, h), crowd in boxes.get(number, ()):
            for _ in range(3):
                other = int(rng.choice([CAT, DOG, BUS]))
                jitter = rng.normal(0, 3, 4)
                box = np.maximum(np.array([x, y, w, h]) + jitter, [-30, -30, 1, 1])
                add(number, category if rng.random() < 0.8 else other, box)
            if crowd:
                add(number, category, [x + w / 4, y + h / 4, w / 3, h / 3])
        add(number, CAT, [*rng.uniform(0, 200, 2), *rng.uniform(10, 90, 2)])
    for _ in range(130):  # more than the 100 that count
        add(numbers[-1], DOG, [*rng.uniform(0, 200, 2), 40, 40])
    return rows


def pycocotools_stats(file, rows):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def as_detections(index, rows, categories):
    """Our detections of each image of the index, from result rows."""
    label = {c["id"]: index.classes.index(c["name"]) for c in categories}
    found = []
    for image_id in index.image_ids:
        own = [r for r in rows if r["image_id"] == int(image_id)]
        boxes = np.array([r["bbox"] for r in own], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([label[r["category_id"]] for r in own], dtype=int)
        found.append(ImageDetections(boxes, np.array([r["score"] for r in own]), labels))
    return found


@pytest.mark.parametrize("classes", [(), ("bus", "cat", "dog")])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_those_of_pycocotools_on_the_file(coco_tree, seed, classes):
    rng = np.random.default_rng(seed)
    numbers, boxes = random_set(coco_tree, rng)
    rows = random_results(rng, numbers, boxes)
    root = coco_tree.write()
    stats = pycocotools_stats(coco_tree.file, rows)
    index = read_index(root, "train", classes)
    assert {"bus", "cat", "dog"} == set(index.classes)
    assert len(index) == len(numbers)
    assert index.coco.crowd.any()
    detections, truth = as_detections(index, rows, coco_tree.categories), ground_truth(index)
    metrics = evaluate(detections, truth, index.classes)
    coco, named = metrics.coco, metrics.as_dict()
    ours = [named["AP"], coco.ap50, named["AP75"]]
    ours += [named[f"AP_{size}"] for size in ("small", "medium", "large")]
    np.testing.assert_allclose(ours, stats[:6], rtol=0, atol=1e-12)
    assert (stats[:6] > 0.02).all()  # a case that says something
    # Each part of the rule matters in this case.
    for changed in (
        [replace(t, crowd=None) for t in truth],
        [replace(t, areas=None) for t in truth],
        [replace(t, difficult=t.crowd & False, crowd=None) for t in truth],
    ):
        other = evaluate_coco(detections, changed, 3)
        values = (other.ap, other.ap_small, other.ap_medium, other.ap_large)
        assert not np.allclose(values, np.take(stats, [0, 3, 4, 5]), rtol=0, atol=1e-6)


def test_voc_metric_takes_a_crowd_for_difficult(coco_tree):
    coco_tree.image(1, size=(200, 200))
    coco_tree.object(1, CAT, (100, 100, 50, 50), crowd=1)
    coco_tree.object(1, CAT, (0, 0, 50, 50))
    index = read_index(coco_tree.write(), "train")
    crowd, single = [100, 100, 150, 150], [0, 0, 50, 50]
    found = ImageDetections(np.array([crowd, single]), np.array([0.9, 0.8]), np.array([0, 0]))
    metrics = evaluate([found], ground_truth(index), index.classes)
    assert metrics.ap50 == pytest.approx(1.0)
    assert metrics.voc.num_boxes.tolist() == [1, 0, 0]


def tiny_set(coco_tree):
    """Two splits of 64-pixel images; every image has a bus, and it is a crowd."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        coco_tree.start(split)
        for number in range(1, count + 1):
            coco_tree.image(number, size=(64, 64))
            coco_tree.object(number, BUS, (2, 2, 60, 60), crowd=1)
            for _ in range(number % 3):  # every third has the crowd only
                box = (*rng.uniform(0, 30, 2), *rng.uniform(20, 34, 2))
                coco_tree.object(number, int(rng.choice([CAT, DOG])), box)
        coco_tree.write()
    return Data(
        root=str(coco_tree.root),
        source="coco",
        train_split="train",
        test_split="test",
        classes=(),
        image_size=64,
        augment=Augment(shift=0.0),
        workers=0,
    )


def test_crowds_are_no_training_targets(coco_tree):
    data = tiny_set(coco_tree)
    index = load_split(data, "train")
    assert index.classes[2] == "bus"
    singles = int((~index.coco.crowd).sum())
    loader = make_train_loader(DetectionDataset(index), data, batch_size=4)
    for epoch in range(2):
        loader.set_epoch(epoch)
        labels = [int(v) for batch in loader for t in batch.targets for v in t["labels"]]
        assert len(labels) == singles
        assert 2 not in labels


def test_an_experiment_on_a_coco_set(coco_tree, tmp_path, monkeypatch):
    seen = []
    forward = Detector.forward

    def watched(self, images, targets=None):
        seen.extend(int(v) for t in targets or () for v in t["labels"])
        return forward(self, images, targets)

    monkeypatch.setattr(Detector, "forward", watched)
    experiment = Experiment(
        name="tiny",
        model=Model(
            backbone="mobilenetv3_small_050",
            weights="random",
            encoder_channels=16,
            encoder_mid_channels=8,
            dilations=(2,),
            cls_convs=1,
            reg_convs=1,
        ),
        data=tiny_set(coco_tree),
        optim=Optim(optimizer="adamw", lr=1e-3, warmup_iters=2),
        train=Train(
            epochs=1, batch_size=4, dtype="float32", memory_format="contiguous", device="cpu"
        ),
    )
    run = tmp_path / "run"
    run.mkdir()
    train(experiment, run)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images"] == 4
    assert list(metrics["per_class"]) == ["cat", "dog", "bus"]
    assert metrics["per_class"]["bus"] == {"AP50": None, "AP50_11pt": None, "AP": None, "boxes": 0}
    assert metrics["AP"] is not None
    assert {0, 1} == set(seen)  # cats and dogs are trained on, the crowds of buses never
