"""Memory and speed with an index of many images, in this process and in loader processes.

python tests/benchmarks/index_memory.py [--voc FOLDER --images 33000]

It makes a folder of COCO's number of images (one file under many names) with the cached index of as
many objects; or, of a folder in VOC layout, copies under new names. For a small set and for that
one it prints the seconds to read the annotations, to the first batch and per batch, and the unique
and proportional memory (USS, PSS) of each process after a number of batches. USS is what ending
the process would free. Linux only: it reads /proc/PID/smaps_rollup.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT = "train2017"
CLASSES = tuple(f"class {i}" for i in range(80))


def main() -> None:
    """Measure a small and a large set, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=118_287, help="images of the large set")
    parser.add_argument("--objects", type=int, default=860_001, help="objects of the large set")
    parser.add_argument("--batches", type=int, default=300, help="of 8 images, before the end")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--voc", type=Path, help="folder in VOC layout to copy under new names")
    options = parser.parse_args()
    small = len([*(options.voc / "Annotations").iterdir()]) if options.voc else 1000
    for images in (small, options.images):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TINYDET_CACHE"] = f"{folder}/cache"
            if options.voc:
                copy_voc(options.voc, Path(folder) / "set", images)
            else:
                make_set(Path(folder) / "set", images, options.objects * images // options.images)
            print(f"{images} images", flush=True)
            fresh = multiprocessing.get_context("spawn").Process(
                target=measure,
                args=(Path(folder), bool(options.voc), options.batches, options.workers),
            )
            fresh.start()
            fresh.join()


def copy_voc(source: Path, root: Path, images: int) -> None:
    """Copy images and annotations, again under new names, until there are as many as wanted."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    names = sorted(path.stem for path in (source / "Annotations").iterdir())
    copies = [(names[n % len(names)], f"{names[n % len(names)]}_{n}") for n in range(images)]
    for name, copy in copies:
        shutil.copy(source / f"JPEGImages/{name}.jpg", root / f"JPEGImages/{copy}.jpg")
        shutil.copy(source / f"Annotations/{name}.xml", root / f"Annotations/{copy}.xml")
    lines = "".join(f"{copy}\n" for _, copy in copies)
    (root / f"ImageSets/Main/{SPLIT}.txt").write_text(lines)


def make_set(root: Path, images: int, objects: int) -> None:
    """Make a folder in COCO layout and the cache of its index; its annotation file is empty."""
    from tinydet.data.coco import _files_below
    from tinydet.data.index import CocoTruth, Index, cache_file, fingerprint, save_index
    from tinydet.data.problems import Problems

    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root / SPLIT).mkdir()
    annotation_file = root / "annotations" / f"instances_{SPLIT}.json"
    annotation_file.write_text("{}")
    pixels = np.kron(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8), np.ones((16, 16, 1)))
    photo = root / "photo.jpg"
    Image.fromarray(pixels.astype(np.uint8)).save(photo)
    ids = rng.choice(600_000, images, replace=False)
    ids.sort()
    # Hard links are limited to some 65 000 a file on ext4.
    for n in ids.tolist():
        (root / SPLIT / f"{n:012d}.jpg").symlink_to(photo)
    counts = np.bincount(rng.integers(0, images, objects), minlength=images)
    corners = rng.uniform(0, 300, (objects, 4))
    boxes = np.concatenate([corners[:, :2], corners[:, :2] + 20 + corners[:, 2:] / 2], axis=1)
    boxes[:, 3] = boxes[:, 3].clip(max=480)
    crowd = rng.random(objects) < 0.01
    index = Index(
        root=root,
        split=SPLIT,
        classes=CLASSES,
        image_ids=[str(n) for n in ids],
        image_files=[f"{SPLIT}/{n:012d}.jpg" for n in ids],
        sizes=np.tile(np.array([480, 640], dtype=np.int32), (images, 1)),
        exif_rotated=np.zeros(images, dtype=bool),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes.astype(np.float32),
        labels=rng.integers(0, 80, objects),
        difficult=crowd,
        problems=Problems(),
        coco=CocoTruth(boxes, (boxes[:, 2:] - boxes[:, :2]).prod(1), crowd),
    )
    files = [root / SPLIT / file for file in _files_below(root / SPLIT)]
    mark = fingerprint([annotation_file, *files])
    save_index(index, cache_file(root, SPLIT, CLASSES), mark)


def measure(folder: Path, voc: bool, batches: int, workers: int) -> None:
    """Read the set's index, load batches, and print time and memory."""
    import torch

    from tinydet.config import VOC_CLASSES, Data
    from tinydet.data.dataset import DetectionDataset, load_split
    from tinydet.data.loader import make_train_loader

    torch.set_num_threads(1)
    data = Data(
        root=str(folder / "set"),
        source="folder" if voc else "coco",
        train_split=SPLIT,
        classes=VOC_CLASSES if voc else CLASSES,
        image_size=320,
        workers=workers,
    )
    show("  imports alone", os.getpid())
    started = time.perf_counter()
    index = load_split(data, SPLIT)
    read = time.perf_counter()
    print(f"  {len(index)} images, {len(index.boxes)} objects: read in {read - started:.1f} s")
    started = time.perf_counter()
    index = load_split(data, SPLIT)
    read = time.perf_counter()
    loader = make_train_loader(DetectionDataset(index), data, batch_size=8)
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter()
    print(f"  index from cache {read - started:.1f} s, first batch {first - started:.1f} s")
    show("  index, first batch", os.getpid())
    epoch, restarts, began = 0, 0.0, time.perf_counter()
    for _ in range(batches):
        if next(iterator, None) is None:
            restart = time.perf_counter()
            epoch += 1
            loader.set_epoch(epoch)
            iterator = iter(loader)
            restarts += time.perf_counter() - restart
    seconds = time.perf_counter() - began
    print(f"  {1000 * seconds / batches:.1f} ms per batch; {epoch} new epochs in {restarts:.1f} s")
    show(f"  after {batches} batches", os.getpid())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"    at its peak          RSS {peak:6.0f} MB")
    for process in multiprocessing.active_children():
        show("    a loader process", process.pid)


def show(what: str, process: int) -> None:
    """Print the memory of a process in MB."""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        sizes[name.rstrip(":")] = int(kilobytes)
    unique = sizes["Private_Clean"] + sizes["Private_Dirty"]
    print(
        f"{what:<22} USS {unique / 1024:6.0f} MB, PSS {sizes['Pss'] / 1024:6.0f} MB, "
        f"RSS {sizes['Rss'] / 1024:6.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
