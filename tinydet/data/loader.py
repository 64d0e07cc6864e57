"""Loaders of batches whose content depends on seed and epoch only, not on the loader processes."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tinydet.config import Data
from tinydet.data.canvas import PAD_VALUE
from tinydet.data.sample import Batch, Sample
from tinydet.data.sampler import TestBatches, TrainBatches
from tinydet.data.sources import TestSource, TrainSource
from tinydet.data.transforms import network_size, padded_size, test_transform
from tinydet.data.voc import DetectionDataset
from tinydet.memory import return_freed_memory

logger = logging.getLogger(__name__)


class DetectionLoader(DataLoader):
    """A DataLoader of `Batch` that reports each image it had to replace, once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reported: set[str] = set()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch whose order and augmentation the next iteration has.

        Args:
            epoch: number from 0.
            start: batches of the epoch to leave out; they are not even read. `len` stays the
                whole epoch's.
        """
        self.batch_sampler.set_epoch(epoch, start)

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            for image_id in batch.unreadable:
                if image_id not in self._reported:
                    self._reported.add(image_id)
                    logger.warning("image %s cannot be decoded any more: replaced", image_id)
            yield batch


class WorkerDiedError(ValueError):
    """A loader process was killed; the message says which, why and what to do."""


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Turn the error that torch raises, anywhere in the main process, for a dead loader process.

    Raises:
        WorkerDiedError: one of the processes of a loader used within has died.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if not found:
            raise
        signalled = re.search(r"killed by signal: ([\w ]+)", str(error))
        how = f"was killed ({signalled[1]})" if signalled else "died"
        raise WorkerDiedError(
            f"loader process {found[1]} {how}: most likely memory ran out; take fewer loader "
            "processes (--set data.workers=N, 0 loads in the main process) or smaller images"
        ) from error


def make_train_loader(
    dataset: DetectionDataset,
    data: Data,
    batch_size: int,
    seed: int = 0,
    *,
    epochs: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> DetectionLoader:
    """Return the loader of shuffled, augmented training batches; call `set_epoch` every epoch.

    Args:
        dataset: what is trained on; its own transform, where it has one, takes the place of
            `train_transform(data)`, and is called with whole images.
        data: image size, augmentation, number of workers, memory for decoded images.
        batch_size: images in a batch of this process.
        seed: seeds order and augmentation.
        epochs: epochs of the whole run, the last of which are `data.augment.plain_epochs`; None
            has none of these.
        rank: this process among `world_size`.
        world_size: processes training together; each gets as many images as the others.
        device: where the model trains; decides on pinned memory and on the number of workers.

    Raises:
        ValueError: the data set is empty, or batch_size is not positive.
        ConfigError: `data.cache_mb` is more than the machine's memory.
    """
    batches = TrainBatches(
        dataset.index.sizes,
        batch_size,
        seed,
        image_size=data.image_size,
        multiscale=data.augment.multiscale,
        rank=rank,
        world_size=world_size,
    )
    if epochs is not None and 0 < epochs <= data.augment.plain_epochs:
        logger.warning(
            "data.augment.plain_epochs=%d: all %d epochs are without mosaic, mixup, warp and hsv",
            *(data.augment.plain_epochs, epochs),
        )
    source = TrainSource(dataset, data, seed, epochs)
    return _loader(source, batches, _collate_train, data.workers, device, world_size)


def make_test_loader(
    dataset: DetectionDataset,
    data: Data,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> DetectionLoader:
    """Return the loader of all images, resized, each exactly once over all processes.

    A batch holds images of one padded shape only, so no image gets more padding than it needs:
    results do not depend on the batch size, and fewer pixels are computed. An image that cannot be
    decoded is a grey one: its objects count as missed.

    Args:
        dataset: what is evaluated.
        data: image size and number of workers.
        batch_size: most images in a batch.
        rank: this process among `world_size`.
        world_size: processes evaluating together; process r reads images r, r + world_size, ...
        device: where the model runs; decides on pinned memory and on the number of workers.

    Raises:
        ValueError: batch_size is not positive.
    """
    shapes = [
        padded_size(
            network_size(dataset.index.size(i), data.image_size, data.keep_ratio, data.short_side)
        )
        for i in range(len(dataset))
    ]
    batches = TestBatches(shapes, batch_size, rank=rank, world_size=world_size)
    source = TestSource(dataset, dataset.transform or test_transform(data))
    return _loader(source, batches, _collate_test, data.workers, device, world_size)


def choose_workers(workers: int, device: torch.device | str, world_size: int = 1) -> int:
    """Return the number of loader processes; -1 chooses from the cores this process may use.

    Several processes that train together share the cores, as if all were on one machine.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, (cores or 1) // world_size)
    if torch.device(device).type == "cpu":
        # The model needs the cores itself. Where it has to wait for data all the same, two of its
        # cores prepare them at once.
        return min(2, cores)
    return min(8, max(1, cores - 1))


def collate(samples: Sequence[Sample], keep_difficult: bool) -> Batch:
    """Pad samples at the right and bottom to one shape, and put them into a batch.

    Args:
        samples: of any sizes; the batch has the largest height and width, in whole strides.
        keep_difficult: keep difficult objects in the targets.
    """
    height, width = padded_size(
        (max(s.image.shape[-2] for s in samples), max(s.image.shape[-1] for s in samples))
    )
    shape = (len(samples), 3, height, width)
    images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    targets = []
    for image, sample in zip(images, samples, strict=True):
        bottom, right = sample.image.shape[-2:]
        image[:, :bottom, :right] = sample.image
        image[:, bottom:] = PAD_VALUE
        image[:, :bottom, right:] = PAD_VALUE
        kept = torch.ones_like(sample.difficult) if keep_difficult else ~sample.difficult
        targets.append(
            {
                "boxes": sample.boxes[kept],
                "labels": sample.labels[kept],
                "difficult": sample.difficult[kept],
            }
        )
    return Batch(
        images=images,
        targets=targets,
        image_ids=[s.image_id for s in samples],
        sizes=[s.size for s in samples],
        scales=[s.scale for s in samples],
        unreadable=[name for s in samples for name in s.unreadable],
    )


def _collate_train(samples: Sequence[Sample]) -> Batch:
    return collate(samples, keep_difficult=False)


def _collate_test(samples: Sequence[Sample]) -> Batch:
    return collate(samples, keep_difficult=True)


def _loader(
    source: Dataset[Sample],
    batches: TrainBatches | TestBatches,
    collate_batch: Callable[[Sequence[Sample]], Batch],
    workers: int,
    device: torch.device | str,
    world_size: int,
) -> DetectionLoader:
    workers = choose_workers(workers, device, world_size)
    if workers:
        return_freed_memory()
    model_on_cpu = torch.device(device).type == "cpu"
    return DetectionLoader(
        source,
        batch_sampler=batches,
        collate_fn=collate_batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=partial(_start_worker, model_on_cpu),
        # Its own: each iteration draws a number, which must not shift what the model draws.
        generator=torch.Generator(),
        # Forked processes share the index. Python 3.14 would start each afresh: a copy of its own,
        # and half a minute on a busy machine.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def _start_worker(yields: bool, worker: int) -> None:
    del worker
    # Each worker is one process of many: threads of its own would only compete.
    torch.set_num_threads(1)
    # A thread of the model that is made to wait holds up all the others at the end of each layer.
    # The loader takes what they leave; where that is too little the model waits and leaves more.
    if yields and hasattr(os, "nice"):
        os.nice(19)
    # Ctrl-C and `timeout` signal a whole group of processes. The main process, which still needs
    # batches to finish its step, ends its workers itself.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
