"""Loaders of batches that depend on seed and epoch only, not on the number of loader processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from tinydet.config import Data
from tinydet.data.canvas import PAD_VALUE
from tinydet.data.dataset import DetectionDataset
from tinydet.data.sample import Batch, Sample
from tinydet.data.sampler import TestBatches, TrainBatches
from tinydet.data.sources import TestSource, TrainSource
from tinydet.data.transforms import network_size, padded_size, test_transform
from tinydet.memory import return_freed_memory

logger = logging.getLogger(__name__)


class DetectionLoader(DataLoader):
    """A DataLoader of `Batch` that logs each image it had to replace once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reported: set[str] = set()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration, which decides on order and augmentation.

        Args:
            epoch: number from 0.
            start: number of batches to skip, without reading them; `len` still counts them.
        """
        cast(TrainBatches, self.batch_sampler).set_epoch(epoch, start)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with _errors_without_traceback():
            for batch in super().__iter__():
                for image_id in batch.unreadable:
                    if image_id not in self._reported:
                        self._reported.add(image_id)
                        logger.warning("image %s cannot be decoded: replaced", image_id)
                yield batch


@contextmanager
def _errors_without_traceback() -> Iterator[None]:
    """Give an error of a loader process, whose message torch makes its traceback, its own one."""
    try:
        yield
    except Exception as error:
        if not re.match(r"Caught \w+ in DataLoader worker process", str(error)):
            raise
        # The traceback's lines are indented, but for its first one and the error itself.
        *_, message = re.split(r"\n(?=[\w.]+: )", str(error).rstrip())
        raise type(error)(message.partition(": ")[2]) from error


class WorkerDiedError(ValueError):
    """A loader process was killed; the message says which, why and what to do."""


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Give torch's error for a dead loader process, raised anywhere within, a clear message.

    Raises:
        WorkerDiedError: one of the processes of a loader used within has died.
    """
    try:
        yield
    # A process that dies while it sends a batch is a broken connection.
    except (RuntimeError, ConnectionError, EOFError) as error:
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if not found and isinstance(error, RuntimeError):
            raise
        signalled = re.search(r"killed by signal: ([\w ]+)", str(error))
        who = f"loader process {found[1]}" if found else "a loader process"
        how = f"was killed ({signalled[1]})" if signalled else "died"
        raise WorkerDiedError(
            f"{who} {how}: it probably ran out of memory; use fewer loader "
            "processes (--set data.workers=N; 0 loads in the main process) or smaller images"
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
        dataset: the training set; its transform, if it has one, replaces `train_transform(data)`
            and is called with images of full size.
        data: image size, augmentation, number of workers, cache of decoded images.
        batch_size: images in a batch of this process.
        seed: seeds order and augmentation.
        epochs: epochs of the whole run, the last `data.augment.plain_epochs` of which are plain;
            None has no plain epochs.
        rank: this process among `world_size`.
        world_size: number of training processes, which get equally many images.
        device: of the model; decides on pinned memory and on the number of workers.

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
            "data.augment.plain_epochs=%d: no epoch of %d has mosaic, mixup, random affine or hsv",
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

    All images of a batch have the same padded shape, so no image gets more padding than it needs:
    results do not depend on the batch size, and fewer pixels are computed. A grey image replaces
    one that cannot be decoded, so its objects count as missed.

    Args:
        dataset: the evaluation set.
        data: image size and number of workers.
        batch_size: largest number of images in a batch.
        rank: this process among `world_size`.
        world_size: number of processes; process r reads images r, r + world_size, ...
        device: of the model; decides on pinned memory and on the number of workers.

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
    """Return the number of loader processes; -1 chooses by the cores available to this process.

    Several training processes share the cores, as if they were all on one machine.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, (cores or 1) // world_size)
    if torch.device(device).type == "cpu":
        # The model needs the cores itself; while it waits for data, two of them prepare it.
        return min(2, cores)
    return min(8, max(1, cores - 1))


def collate(samples: Sequence[Sample], keep_difficult: bool) -> Batch:
    """Return samples as a batch, padded at the right and bottom to one shape.

    Args:
        samples: of any sizes; the batch has the largest height and width, rounded up to whole
            strides.
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
        # Its own: each iteration draws a number, which must not change those of the model.
        generator=torch.Generator(),
        # Forked processes share the index. Python 3.14 starts new ones by default: each has its
        # own copy, and takes up to half a minute on a busy machine.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def _start_worker(low_priority: bool, worker: int) -> None:
    del worker
    # Threads of a worker would compete with the other workers.
    torch.set_num_threads(1)
    # A delayed thread of the model delays all others at the end of each layer, so the loader uses
    # what time they leave; if that is too little, the model waits for data and leaves more.
    if low_priority and hasattr(os, "nice"):
        os.nice(19)
    # Ctrl-C and `timeout` signal a whole process group, `pkill -f` and batch systems each process.
    # The main process still needs batches to finish its step, and ends its workers itself.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
