"""Reading of training images: no larger than they are needed, and each decoded once if it fits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch

from tinydet.config import ConfigError
from tinydet.data.image import JPEG_SUFFIXES, read_image
from tinydet.data.image_cache import ImageCache
from tinydet.data.sample import Sample
from tinydet.data.voc import DetectionDataset
from tinydet.memory import machine_memory

logger = logging.getLogger(__name__)

_REDUCTIONS = (8, 4, 2)  # what libjpeg offers and pillow can ask for
# A reduced image is at least this much larger than what is made of it. libjpeg's reduction is
# sharper than that of `resized`, by which evaluated images are made: measured by their gradients up
# to 58 % at a margin of 1, under 3 % from 4/3 on, where the resizing that follows decides.
_MARGIN = Fraction(4, 3)


class TrainingImages:
    """Reads the samples of a data set as training needs them.

    Args:
        dataset: the samples.
        largest_size: returns the largest (height, width) that an image of the (height, width) it is
            given will be resized to; None decodes whole images.
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
        """Return sample `i`, its image perhaps at reduced scale.

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
            image = read_image(index.image_path(i), bool(index.turned[i]), reduction)
            if self.cache is not None:
                self.cache.put(i, image.permute(1, 2, 0).numpy())
        # A file may be of another format than its name says, and is whole then.
        whole = tuple(image.shape[1:]) == self.dataset.index.size(i)
        return self.dataset.sample(i, image, 1 if whole else reduction)


def largest_reduction(size: tuple[int, int], needed: tuple[int, int]) -> int:
    """Return the strongest of 8, 4, 2, 1 that leaves an image of `size` large enough.

    That is 4/3 of what is needed, along both sides.
    """
    for r in _REDUCTIONS:
        if all(side // r >= _MARGIN * least for side, least in zip(size, needed, strict=True)):
            return r
    return 1


def _reductions(
    dataset: DetectionDataset, largest_size: Callable[[tuple[int, int]], tuple[int, int]] | None
) -> np.ndarray:
    """Return the reduction of each image, (I,) uint8, and say how many are reduced."""
    index = dataset.index
    if largest_size is None:
        return np.ones(len(index), dtype=np.uint8)
    sizes, number = np.unique(index.sizes, axis=0, return_inverse=True)
    of_size = [largest_reduction(size, largest_size(size)) for size in map(tuple, sizes.tolist())]
    reductions = np.array(of_size, dtype=np.uint8)[number.reshape(-1)]
    # A turned image's partly covered pixels would lie at its left or top.
    is_jpeg = [file.lower().endswith(JPEG_SUFFIXES) for file in index.image_files]
    reductions[index.turned | ~np.array(is_jpeg, dtype=bool)] = 1
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
            "leave the model its share"
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
