"""What a loader process does for one image: read or decode it, and resize or augment it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

from tinydet.config import ConfigError, Data
from tinydet.data.canvas import PAD_VALUE
from tinydet.data.dataset import DetectionDataset
from tinydet.data.image import JPEG_SUFFIXES, read_image
from tinydet.data.image_cache import ImageCache
from tinydet.data.sample import Sample
from tinydet.data.sampler import SampleKey, largest_image_size
from tinydet.data.seeding import integer, seeded_generator
from tinydet.data.transforms import plain, train_transform
from tinydet.memory import machine_memory

logger = logging.getLogger(__name__)

_REDUCTIONS = (8, 4, 2)  # what libjpeg offers and pillow can ask for
# A reduced image is at least this much larger than the image that it is resized to. libjpeg's
# reduction is sharper than `resize`, which evaluation uses alone: by up to 58 % of the gradients at
# a margin of 1, but under 3 % from 4/3 on, where the resizing that follows dominates.
_MARGIN = Fraction(4, 3)


class TrainSource(Dataset[Sample]):
    """Reads and augments the sample of a key; the next image replaces one that cannot be decoded.

    Everything random, the other images of a mosaic included, depends on seed, epoch and index only.

    Args:
        dataset: what is trained on, with its own transform where it has one.
        data: how images are read and augmented.
        seed: part of the seed of each sample.
        epochs: epochs of the whole run, the last of which are plain; None has no plain epochs.
    """

    def __init__(
        self, dataset: DetectionDataset, data: Data, seed: int, epochs: int | None
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.transform = train_transform(data)
        self.plain_transform = train_transform(replace(data, augment=plain(data.augment)))
        self.first_plain = None if epochs is None else epochs - data.augment.plain_epochs
        image_size = largest_image_size(data.image_size, data.augment.multiscale)
        reduced = data.reduced_jpeg and dataset.transform is None
        self.images = TrainingImages(
            dataset,
            partial(self.transform.largest_size, image_size=image_size) if reduced else None,
            data.cache_mb,
        )

    def __getitem__(self, key: SampleKey) -> Sample:
        sample = self._read(key.index)
        generator = seeded_generator("sample", self.seed, key.epoch, key.index)
        if self.dataset.transform is not None:
            sizes = () if key.image_size is None else (key.image_size,)
            return self.dataset.transform(sample, generator, *sizes)
        is_plain = self.first_plain is not None and key.epoch >= self.first_plain
        transform = self.plain_transform if is_plain else self.transform

        def another() -> Sample:
            return self._read(integer(generator, 0, len(self.dataset) - 1))

        return transform(sample, generator, key.image_size, another)

    def _read(self, index: int) -> Sample:
        unreadable: list[str] = []
        for step in range(len(self.dataset)):
            i = (index + step) % len(self.dataset)
            try:
                sample = self.images.read(i)
            except (ValueError, OSError):
                unreadable.append(self.dataset.index.image_ids[i])
                continue
            sample.unreadable = tuple(unreadable)
            return sample
        raise ValueError(f"{self.dataset.index.root}: none of its images can be decoded")


class TestSource(Dataset[Sample]):
    """Reads and resizes images; a grey image replaces one that cannot be decoded.

    Args:
        dataset: what is evaluated.
        transform: called with the sample in its original size and a generator.
    """

    def __init__(self, dataset: DetectionDataset, transform: Callable[..., Sample]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, i: int) -> Sample:
        try:
            sample = self.dataset.read(i)
        except (ValueError, OSError):
            grey = torch.full((3, *self.dataset.index.size(i)), PAD_VALUE, dtype=torch.uint8)
            sample = self.dataset.sample(i, grey)
            sample.unreadable = (sample.image_id,)
        return self.transform(sample, seeded_generator("test", i))


class TrainingImages:
    """Reads images no larger than training needs them, and caches them decoded.

    Args:
        dataset: the samples.
        largest_size: maps the (height, width) of an image to the largest one that it will be
            resized to; None decodes at full size.
        cache_mb: see `tinydet.config.Data`.

    Raises:
        ConfigError: `cache_mb` is more than the machine's memory.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        largest_size: Callable[[tuple[int, int]], tuple[int, int]] | None,
        cache_mb: int,
    ) -> None:
        self.dataset = dataset
        self.reductions = _reductions(dataset, largest_size)
        self.cache = _make_cache(dataset, self.reductions, cache_mb) if cache_mb else None

    def read(self, i: int) -> Sample:
        """Return sample `i`, perhaps at reduced size.

        Raises:
            ValueError: the image cannot be decoded.
            OSError: its file is gone.
        """
        pixels = self.cache.get(i) if self.cache is not None else None
        reduction = int(self.reductions[i])
        if pixels is not None:
            image = torch.from_numpy(pixels).permute(2, 0, 1)
        else:
            index = self.dataset.index
            image = read_image(index.image_path(i), bool(index.exif_rotated[i]), reduction)
            if self.cache is not None:
                self.cache.put(i, image.permute(1, 2, 0).numpy())
        # A file may have another format than its name says; then it is not reduced.
        whole = tuple(image.shape[1:]) == self.dataset.index.size(i)
        return self.dataset.sample(i, image, 1 if whole else reduction)


def largest_reduction(size: tuple[int, int], needed: tuple[int, int]) -> int:
    """Return the largest of 8, 4, 2, 1 that leaves both sides at least 4/3 of what is needed."""
    for r in _REDUCTIONS:
        if all(side // r >= _MARGIN * least for side, least in zip(size, needed, strict=True)):
            return r
    return 1


def _reductions(
    dataset: DetectionDataset, largest_size: Callable[[tuple[int, int]], tuple[int, int]] | None
) -> np.ndarray:
    """Return the reduction of each image, (I,) uint8, and log how many are reduced."""
    index = dataset.index
    if largest_size is None:
        return np.ones(len(index), dtype=np.uint8)
    sizes, number = np.unique(index.sizes, axis=0, return_inverse=True)
    of_size = [largest_reduction(size, largest_size(size)) for size in map(tuple, sizes.tolist())]
    reductions = np.array(of_size, dtype=np.uint8)[number.reshape(-1)]
    # After a rotation, partly covered pixels would lie at the left or top edge.
    is_jpeg = [file.lower().endswith(JPEG_SUFFIXES) for file in index.image_files]
    reductions[index.exif_rotated | ~np.array(is_jpeg, dtype=bool)] = 1
    reduced = int((reductions > 1).sum())
    if reduced:
        logger.info(
            "%d of %d training images are decoded at 1/%s of their size (data.reduced_jpeg)",
            reduced,
            len(index),
            ", 1/".join(str(r) for r in np.unique(reductions[reductions > 1])),
        )
    return reductions


def _make_cache(dataset: DetectionDataset, reductions: np.ndarray, cache_mb: int) -> ImageCache:
    memory_mb = machine_memory() // 2**20
    if cache_mb > memory_mb:
        raise ConfigError(
            f"data.cache_mb={cache_mb}: this machine has {memory_mb} MB of memory; "
            "leave some for the model"
        )
    sides = -(-dataset.index.sizes // reductions[:, None].astype(np.int32))
    cache = ImageCache(sides, cache_mb)
    logger.info(
        "%d of %d decoded training images fit into data.cache_mb=%d and take %d MB",
        cache.count,
        len(dataset),
        cache_mb,
        -(-cache.nbytes // 2**20),
    )
    return cache
