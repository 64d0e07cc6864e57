"""What a loader process does for one image: read it, and resize or augment it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.utils.data import Dataset

from tinydet.config import Data
from tinydet.data.canvas import PAD_VALUE
from tinydet.data.sample import Sample
from tinydet.data.sampler import SampleKey, largest_image_size
from tinydet.data.seeding import integer, seeded_generator
from tinydet.data.training_images import TrainingImages
from tinydet.data.transforms import plain, train_transform
from tinydet.data.voc import DetectionDataset


class TrainSource(Dataset[Sample]):
    """Reads and augments the sample that a key stands for; steps over unreadable images.

    All that is random follows from seed, epoch and index, the other images of a mosaic included.

    Args:
        dataset: what is trained on, with its own transform where it has one.
        data: how images are read and augmented.
        seed: part of the seed of each sample.
        epochs: epochs of the whole run, or None; decides which of them are plain.
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
        raise ValueError(f"{self.dataset.index.root}: not one of its images can be decoded")


class TestSource(Dataset[Sample]):
    """Reads and resizes image by image; an unreadable image is a grey one.

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
            sample = self._grey(i)
        return self.transform(sample, seeded_generator("test", i))

    def _grey(self, i: int) -> Sample:
        index = self.dataset.index
        size, (boxes, labels, difficult) = index.size(i), index.objects(i)
        return Sample(
            image=torch.full((3, *size), PAD_VALUE, dtype=torch.uint8),
            boxes=torch.tensor(boxes),
            labels=torch.tensor(labels),
            difficult=torch.tensor(difficult),
            image_id=index.image_ids[i],
            size=size,
            unreadable=(index.image_ids[i],),
        )
