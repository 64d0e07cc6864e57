"""Which images form which batch: decided in the main process, by seed and epoch only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from tinydet.data.seeding import integer, seeded_generator, uniform
from tinydet.data.transforms import STRIDE


class SampleKey(NamedTuple):
    """What a loader process needs to make one training sample.

    Attributes:
        index: number of the image.
        epoch: epoch, part of the seed of its augmentation.
        image_size: longer side of the network's input if it is drawn for each batch, else None.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    epoch: int
    image_size: int | None


class TrainBatches(Sampler[list[SampleKey]]):
    """Shuffled batches of one epoch, as many on every process.

    An epoch has full batches only. The images left over are different ones in every epoch: over any
    number of epochs, the counts of any two images differ by at most one.

    Portrait and landscape images are in separate batches: together they would be padded to a
    square, a quarter of it empty. The remainders of both kinds fill exactly one batch.

    Several processes share each batch: 2 processes x 8 images see the batches of 1 x 16.

    Args:
        sizes: (I, 2) heights and widths of all images.
        batch_size: images in a batch of one process.
        seed: seeds order and sizes.
        image_size: longer side of the network's input in pixels.
        multiscale: range of factors on `image_size`, drawn for each batch; (1, 1) is off.
        rank: this process.
        world_size: number of processes. Fewer images than a batch of all processes form one batch;
            some are used twice if the processes cannot share them evenly.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        image_size: int,
        multiscale: tuple[float, float] = (1.0, 1.0),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not len(sizes):
            raise ValueError("the training split has no images")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.upright = (sizes[:, 0] > sizes[:, 1]).tolist()
        self.batch_size = batch_size
        self.seed = seed
        self.image_size = image_size
        self.multiscale = multiscale
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration give the batches of an epoch from number `start` on."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return max(1, len(self.upright) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # All at once, so that a later set_epoch does not affect a running iteration.
        batches = []
        for number, batch in enumerate(self._batches()):
            image_size = self._draw_size(number)
            batches.append([SampleKey(index, self.epoch, image_size) for index in batch])
        return iter(batches[self.start :])

    def _batches(self) -> list[list[int]]:
        """Return this process's part of every batch of the epoch, in image numbers."""
        generator = seeded_generator("order", self.seed, self.epoch)
        total = self.batch_size * self.world_size
        batches: list[list[int]] = []
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for index in self._images(generator):
            same = waiting[self.upright[index]]
            same.append(index)
            if len(same) == total:
                batches.append(same.copy())
                same.clear()
        if rest := waiting[False] + waiting[True]:
            batches.insert(integer(generator, 0, len(batches)), rest)
        return [batch[self.rank :: self.world_size] for batch in batches]

    def _images(self, generator: torch.Generator) -> list[int]:
        """Return the images of the epoch's batches in random order."""
        number, total = len(self.upright), self.batch_size * self.world_size
        order = torch.randperm(number, generator=generator).tolist()
        held = number - number % total or -(-number // self.world_size) * self.world_size
        # The images left out, or used twice, are the next ones of a fixed order.
        changed = abs(number - held)
        rotation = torch.randperm(number, generator=seeded_generator("rotation", self.seed))
        first = self.epoch * changed
        chosen = rotation[torch.arange(first, first + changed) % number].tolist()
        if held > number:
            return order + chosen
        left_out = set(chosen)
        return [index for index in order if index not in left_out]

    def _draw_size(self, number: int) -> int | None:
        """Draw a batch's image size: the same on all ranks, which then take equally long."""
        low, high = self.multiscale
        if low == high == 1.0:
            return None
        generator = seeded_generator("size", self.seed, self.epoch, number)
        return _whole_strides(self.image_size * uniform(generator, low, high))


def largest_image_size(image_size: int, multiscale: tuple[float, float]) -> int:
    """Return the largest longer side that `TrainBatches` gives a batch, in pixels."""
    if multiscale == (1.0, 1.0):
        return image_size
    return _whole_strides(image_size * multiscale[1])


def _whole_strides(size: float) -> int:
    return max(STRIDE, round(size / STRIDE) * STRIDE)


class TestBatches(Sampler[list[int]]):
    """Batches of images that share one padded shape; each image once over all processes.

    Args:
        shapes: padded (height, width) of every image.
        batch_size: most images in a batch.
        rank: this process.
        world_size: number of processes.
    """

    __test__ = False  # it is no test class

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        groups: dict[tuple[int, int], list[int]] = {}
        for i in range(rank, len(shapes), world_size):
            groups.setdefault(shapes[i], []).append(i)
        self.batches = [
            group[start : start + batch_size]
            for group in groups.values()
            for start in range(0, len(group), batch_size)
        ]

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Do nothing, as all epochs are equal."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
