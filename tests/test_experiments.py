"""Every experiment file: the quick check here, all of it with `python tests/test_experiments.py`.

Run as a script it trains each experiment for 20 steps on the synthetic set, folds it, exports it to
ONNX, and compares each form with the one before. Names of experiments may follow, and `--images
FOLDER` compares the ONNX file on 50 photographs, in batches of 1, 3 and 8 and in two sizes.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import resize

from tinydet.backbones.factory import create_backbone
from tinydet.config import Augment, Data, Model, Optim
from tinydet.data.dataset import DetectionDataset, load_split
from tinydet.data.image import read_image
from tinydet.data.loader import make_train_loader
from tinydet.data.shapes import render_shapes
from tinydet.deployment.agreement import largest_differences, scores_and_boxes
from tinydet.deployment.fold_checkpoint import fold_detector
from tinydet.deployment.images import random_images
from tinydet.deployment.onnx import compare_with_torch, export_detector
from tinydet.experiment_file import load_experiment
from tinydet.training.optim import make_optimizer, make_schedule
from tinydet.yolof.build import build_detector

FILES = sorted((Path(__file__).resolve().parents[1] / "experiments").glob("*.py"))
COMPARED = sorted((Path(__file__).resolve().parent / "benchmarks" / "compared").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_builds_and_takes_a_step_that_lowers_its_loss(path):
    torch.manual_seed(0)
    experiment = load_experiment(path, ["model.weights=random"])
    detector = build_detector(experiment.model, experiment.data.classes or ("a", "b"))
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    targets = [
        {
            "boxes": torch.tensor([[20.0, 4, 90, 60], [0, 0, 30, 30]]),
            "labels": torch.tensor([0, 1]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    schedule = make_schedule(experiment.optim, 2, 100)
    optimizer = make_optimizer(detector, experiment.optim, schedule)
    losses = []
    for _ in range(5):
        loss = sum(detector(images, targets)[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_a_compared_file_builds(path):
    experiment = load_experiment(path, ["model.weights=random"])
    build_detector(experiment.model, ("a", "b"))


def test_the_defaults_are_the_reference_recipe():
    # arXiv 2103.09460 and its reference code: SGD 0.12 for 64 images (0.03 for 16), and so on; the
    # rate drops after 8 and 11 of 12 epochs, as in MMDetection.
    optim, model = Optim(), Model()
    assert optim.lr / optim.base_batch == pytest.approx(0.12 / 64)
    assert (optim.momentum, optim.weight_decay, optim.warmup_iters) == (0.9, 1e-4, 1500)
    assert optim.backbone_lr_factor == pytest.approx(1 / 3)
    assert optim.milestones == pytest.approx((8 / 12, 11 / 12))
    assert (model.encoder_channels, model.encoder_mid_channels) == (512, 128)
    assert (model.dilations, model.cls_convs, model.reg_convs) == ((2, 4, 6, 8), 2, 4)
    assert (model.match_topk, model.match_pos_ignore, model.match_neg_ignore) == (4, 0.15, 0.7)
    assert (model.center_clamp, model.score_threshold, model.nms_iou) == (32, 0.05, 0.6)
    assert (model.candidates, model.max_detections) == (1000, 100)
    assert [32 * s for s in model.anchor_scales] == [32, 64, 128, 256, 512]


# The authors' code, github.com/chensnathan/YOLOF: its defaults and those of detectron2, with what
# each file of configs/ changes.
R50_C5 = {
    "images": 64,
    "rate": (0.12, 0.334, 0.9, 1e-4),  # the backbone's factor, momentum and weight decay
    "warmup": (0.00066667, 1500),
    "steps": (15000, 20000, 22500),  # the last one is the end
    "sizes": (800, 1333),
    "augment": Augment(hflip=0.5, shift=0.5, max_shift=32),
    "frozen": {"conv1", "bn1", "layer1"},  # detectron2's FREEZE_AT=2
    "frozen_norms": True,
    "synced_norms": False,
    "anchors": (32, 64, 128, 256, 512),
    "encoder": (512, 128, (2, 4, 6, 8)),
    "decoder": (2, 4),
    "matcher": (4, 0.15, 0.7),
    "test": (32, 0.05, 1000, 0.6, 100),
}
ORIGINALS = {
    "yolof_r50_c5_coco": R50_C5,
    "yolof_r50_dc5_coco": R50_C5
    | {
        "images": 32,
        "rate": (0.06, 0.334, 0.9, 1e-4),
        "warmup": (0.000334, 3000),
        "steps": (30000, 40000, 45000),
        "anchors": (16, 32, 64, 128, 256, 512),
        "encoder": (512, 128, (4, 8, 12, 16)),
        "matcher": (8, 0.1, 0.7),
    },
    "yolof_cspdarknet53_dc5_coco": R50_C5
    | {
        "rate": (0.04, 1.0, 0.9, 1e-4),
        "steps": (52500, 62500, 67500),
        "sizes": (640, 640),
        # Saturation and value by factors of 1/1.5 to 1.5.
        "augment": replace(
            R50_C5["augment"], multiscale=(0.8, 1.2), mosaic=0.5, hsv=(0.1, 0.5, 0.5)
        ),
        "frozen": {"stem_conv1", "stages_0", "stages_1"},  # the code of its DarkNet
        "frozen_norms": False,
        "synced_norms": True,
        "anchors": (16, 32, 64, 128, 256, 512),
        "encoder": (512, 128, (1, 2, 3, 4, 5, 6, 7, 8)),
        "matcher": (4, 0.1, 0.7),
    },
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_an_experiment_on_coco_has_the_original_s_values(name):
    theirs = ORIGINALS[name]
    experiment = load_experiment(FILES[0].parent / f"{name}.py", ["model.weights=random"])
    model, data, optim = experiment.model, experiment.data, experiment.optim
    backbone = create_backbone(model.backbone, "random", model.feature, model.freeze_stages)
    ours = {
        "images": optim.base_batch,
        "rate": (optim.lr, optim.backbone_lr_factor, optim.momentum, optim.weight_decay),
        "warmup": (optim.warmup_factor, optim.warmup_iters),
        "steps": tuple(round(part * theirs["steps"][-1], 6) for part in (*optim.milestones, 1)),
        "sizes": (data.short_side or data.image_size, data.image_size),
        "augment": data.augment,
        "frozen": {part for part in backbone.fixed if list(backbone.module[part].parameters())},
        "frozen_norms": model.freeze_norms,
        "synced_norms": experiment.train.sync_norms,
        "anchors": tuple(scale * backbone.stride for scale in model.anchor_scales),
        "encoder": (model.encoder_channels, model.encoder_mid_channels, model.dilations),
        "decoder": (model.cls_convs, model.reg_convs),
        "matcher": (model.match_topk, model.match_pos_ignore, model.match_neg_ignore),
        "test": (
            *(model.center_clamp, model.score_threshold, model.candidates),
            *(model.nms_iou, model.max_detections),
        ),
    }
    assert ours == theirs
    assert data.keep_ratio == (theirs["sizes"][0] != theirs["sizes"][1])
    # Whole epochs of the 118,287 images of train2017.
    assert experiment.train.epochs == theirs["steps"][-1] * theirs["images"] // 118_287


def _train(detector, experiment, batches):
    # From random weights the whole rate at once is too much; the recipe's 1500 steps are too slow.
    schedule = make_schedule(replace(experiment.optim, warmup_iters=50), 8, 100)
    optimizer = make_optimizer(detector, experiment.optim, schedule)
    losses = []
    for batch in batches:
        loss = sum(detector(batch.images, batch.targets)[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _photographs(folder):
    """Return 50 images of a folder as batches of 8, 3 and 1, half of them in either size."""
    files = sorted(folder.glob("*.jpg"))[:50]
    assert len(files) == 50, f"{folder}: 50 JPEG files are needed"
    images = iter(read_image(file, orientation=True) for file in files)
    return [
        torch.stack([resize(next(images), size, antialias=True) for _ in range(number)])
        for size in ([128, 160], [192, 256])
        for number in (8, 8, 3, 3, 1, 1, 1)
    ]


def _export(folded, experiment, images):
    """Export for any size, or where torch cannot do that for the first; return what it takes."""
    try:
        return export_detector(folded, experiment.data), images, "any size"
    except ValueError:
        size = tuple(images[0].shape[-2:])
        fitting = [batch for batch in images if tuple(batch.shape[-2:]) == size]
        return export_detector(folded, experiment.data, size), fitting, f"{size[0]}x{size[1]} alone"


def _check_whole(path, batches, classes, photographs):
    torch.manual_seed(0)
    experiment = load_experiment(path, ["model.weights=random"])
    detector = build_detector(experiment.model, classes)
    losses = _train(detector, experiment, batches)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < first, f"loss {first:.3f} -> {last:.3f}"
    detector.eval()
    # Threshold and detections as few steps leave them: scores are low.
    detector.config = replace(detector.config, score_threshold=0.001)
    images = random_images(2, (128, 160))
    folded, report = fold_detector(detector)
    with torch.inference_mode():
        forms = [scores_and_boxes(form, images) for form in (detector, folded)]
    score, box = largest_differences(*forms)
    assert score <= 1e-4, f"folded scores differ by {score:.1e}"
    assert box <= 0.01, f"folded boxes differ by {box:.1e} px"
    assert (report.norms_after, report.branches_after) == (0, 0)
    model, seen, sizes = _export(folded, experiment, photographs or [images])
    operators = Counter(node.op_type for node in model.graph.node)
    assert not operators["BatchNormalization"]
    check = compare_with_torch(model, folded, seen)
    assert check.same, check.line()
    assert max(check.max_box, check.agreement.max_box) <= 0.01, check.line()
    return (
        f"loss {first:.2f} -> {last:.2f}; norms {report.norms_before} -> 0; folded scores within "
        f"{score:.1e}, boxes {box:.1e} px; ONNX ({sizes}, {sum(map(len, seen))} images): "
        f"{check.line()}"
    )


def _run_all(names, folder_of_images):
    photographs = _photographs(folder_of_images) if folder_of_images else []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shapes"
        render_shapes(root, num_train=160, num_test=1)
        data = Data(root=str(root), source="shapes", classes=(), image_size=160, workers=0)
        index = load_split(data, "trainval")
        loader = make_train_loader(DetectionDataset(index), data, 8, 0)
        batches = list(islice(loader, 20))
    assert len(batches) == 20
    for path in FILES:
        if names and path.stem not in names:
            continue
        start = time.perf_counter()
        try:
            outcome = _check_whole(path, batches, index.classes, photographs)
        except Exception as error:
            # Whatever is wrong with one experiment, the others are still tried.
            outcome = f"FAILED {type(error).__name__} {str(error).splitlines()[:1]}"
        sys.stdout.write(f"{path.stem}: {outcome}; {time.perf_counter() - start:.0f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="experiments; default: all")
    parser.add_argument("--images", type=Path, help="a folder of JPEG files")
    asked = parser.parse_args()
    _run_all(asked.names, asked.images)
