"""Train what else there is on a folder in VOC layout, for as long as TinyDet had.

python tests/benchmarks/peers_on_voc.py ssdlite FOLDER --minutes 40
python tests/benchmarks/peers_on_voc.py yolo FOLDER --minutes 40 --yolo VENV/bin/yolo

ssdlite: torchvision's SSDLite320 MobileNetV3-L from random weights by the recipe of its references
(SGD, 0.15 for 192 images, weight decay 4e-5, cosine; RandomIoUCrop and flips), which is made for
660 epochs of COCO. yolo: Ultralytics' smallest model from random weights with its own defaults; it
runs in an environment of its own (`pip install ultralytics`). The last epoch is evaluated, SSDLite
by TinyDet's metrics, YOLO by its own, which leave out difficult objects altogether.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image

from tinydet.config import VOC_CLASSES
from tinydet.data.dataset import DetectionDataset
from tinydet.data.voc import read_index
from tinydet.evaluation import ImageDetections, evaluate
from tinydet.training.evaluate import ground_truth

BATCH = 24  # of the reference recipe, for each of its eight GPUs


def main() -> None:
    """Train one of them and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("detector", choices=("ssdlite", "yolo"))
    parser.add_argument("folder", type=Path, help="in VOC layout, with VOC's classes")
    parser.add_argument("--splits", nargs=2, default=("train", "val"), metavar=("TRAIN", "TEST"))
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, default 20")
    parser.add_argument("--yolo", default="yolo", help="Ultralytics' command")
    parser.add_argument("--model", default="yolo26n.yaml", help="Ultralytics' model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    figures = train_ssdlite(options) if options.detector == "ssdlite" else train_yolo(options)
    figures["cpu_seconds"] = sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    path = options.out / f"{options.detector}.json"
    path.write_text(json.dumps({"minutes": options.minutes, **figures}, indent=1) + "\n")
    print(f"wrote {path}: {figures}")


def train_ssdlite(options: argparse.Namespace) -> dict[str, float]:
    """Train torchvision's SSDLite for some minutes, with the schedule of its recipe."""
    torch.manual_seed(options.seed)
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=len(VOC_CLASSES) + 1
    )
    train, test = (
        DetectionDataset(read_index(options.folder, split, VOC_CLASSES)) for split in options.splits
    )
    rate = 0.15 * BATCH / 192
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=4e-5)
    began, images = time.process_time(), 0
    for batch in _batches(train, options.seed):
        done = (time.process_time() - began) / (60 * options.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
        loss = sum(model(*batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images += len(batch[0])
        if images % (20 * BATCH) == 0:
            print(f"{100 * done:.0f} %, {images / len(train):.1f} epochs, loss {loss:.3f}")
    metrics = evaluate(_detect(model, test), ground_truth(test.index), VOC_CLASSES)
    return {"epochs": images / len(train), **metrics.as_dict()}


def _batches(dataset: DetectionDataset, seed: int) -> Iterator[tuple[list[Tensor], list[dict]]]:
    change = v2.Compose(
        [
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(),
            v2.SanitizeBoundingBoxes(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(dataset), generator=generator).tolist()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            images, targets = [], []
            for i in order[start : start + BATCH]:
                sample = dataset.read(i)
                taught = ~sample.difficult
                height, width = sample.image.shape[-2:]
                boxes = BoundingBoxes(
                    sample.boxes[taught],
                    format=BoundingBoxFormat.XYXY,
                    canvas_size=(height, width),
                )
                target = {"boxes": boxes, "labels": sample.labels[taught] + 1}
                image, target = change(Image(sample.image), target)
                images.append(image.as_subclass(Tensor))
                targets.append({k: v.as_subclass(Tensor) for k, v in target.items()})
            yield images, targets


@torch.inference_mode()
def _detect(model: nn.Module, dataset: DetectionDataset) -> list[ImageDetections]:
    model.eval()
    found = []
    for i in range(len(dataset)):
        (one,) = model([dataset.read(i).image / 255])
        parts = (one["boxes"], one["scores"], one["labels"] - 1)
        found.append(ImageDetections(*(part.numpy() for part in parts)))
    return found


def train_yolo(options: argparse.Namespace) -> dict[str, float]:
    """Write the folder's annotations as YOLO's, and train a model of Ultralytics."""
    root = (options.out / "yolo").resolve()
    for split in options.splits:
        index = read_index(options.folder, split, VOC_CLASSES)
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(index.image_ids):
            link = root / "images" / split / index.image_path(i).name
            link.unlink(missing_ok=True)
            link.symlink_to(index.image_path(i).resolve())
            objects, (height, width) = index.objects(i), index.size(i)
            boxes = box_convert(torch.from_numpy(objects.boxes), "xyxy", "cxcywh")
            boxes /= torch.tensor([width, height, width, height])
            lines = [
                " ".join(map(str, [label, *box]))
                for label, box, difficult in zip(
                    objects.labels.tolist(), boxes.tolist(), objects.difficult, strict=True
                )
                if not difficult
            ]
            (root / "labels" / split / f"{name}.txt").write_text("\n".join(lines))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(VOC_CLASSES))
    train, test = options.splits
    (root / "data.yaml").write_text(
        f"path: {root}\ntrain: images/{train}\nval: images/{test}\nnames:\n{names}"
    )
    command = [
        *(options.yolo, "detect", "train", f"model={options.model}", f"data={root / 'data.yaml'}"),
        *("imgsz=320", f"time={options.minutes / 60}", "device=cpu", "workers=1", "val=False"),
        *("plots=False", f"seed={options.seed}", f"project={root}", "name=run", "exist_ok=True"),
    ]
    print(" ".join(command))
    subprocess.run(command, check=True)
    rows = list(csv.DictReader((root / "run" / "results.csv").open()))
    return {name.strip(): float(value) for name, value in rows[-1].items()}


if __name__ == "__main__":
    main()
