"""Images to verify and time a detector on: the experiment's test images, or random ones."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from tinydet.config import Data, Experiment
from tinydet.data.dataset import DetectionDataset, is_missing, load_split
from tinydet.data.loader import make_test_loader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleImages:
    """Batches of network inputs.

    Attributes:
        batches: (B, 3, H, W) uint8 each; shapes may differ between batches.
        source: where they come from, for the user.
        real: whether they are test images of the experiment.
    """

    batches: tuple[Tensor, ...]
    source: str
    real: bool

    def warn_if_random(self) -> None:
        """Log a warning that a check on random images says less."""
        if not self.real:
            logger.warning(
                "checked on %s; a moved data set is named by --set data.root=FOLDER", self.source
            )


def sample_images(
    experiment: Experiment, count: int, batch_size: int, split: str | None = None
) -> SampleImages:
    """Return images resized as in evaluation; nothing is downloaded or rendered.

    Args:
        experiment: its data set is used if it exists.
        count: number of images; fewer if the split is smaller. Random images are one batch.
        batch_size: most images in a batch.
        split: of the data set; None is the test split.
    """
    data = replace(experiment.data, workers=0)
    if is_missing(data):
        return _random(data.image_size, batch_size, f"{data.root} does not exist")
    try:
        index = load_split(data, split or data.test_split)
    except (ValueError, OSError) as error:
        return _random(data.image_size, batch_size, str(error))
    batches, left = [], count
    for batch in make_test_loader(DetectionDataset(index), data, batch_size):
        batches.append(batch.images[:left])
        left -= len(batches[-1])
        if left <= 0:
            break
    found = sum(len(batch) for batch in batches)
    return SampleImages(tuple(batches), f"{found} images of {data.root} ({index.split})", True)


def largest_input(data: Data) -> tuple[int, int]:
    """Return the (H, W) of the largest input, in landscape format, as multiples of 32."""
    short = min(data.image_size, data.short_side) if data.keep_ratio and data.short_side else 0
    height, width = (-(-side // 32) * 32 for side in (short or data.image_size, data.image_size))
    return height, width


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (B, 3, H, W) uint8 images in another size; the aspect ratio is not kept."""
    images = functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return images.round().clamp(0, 255).to(torch.uint8)


def random_images(batch_size: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return a (batch_size, 3, H, W) uint8 batch of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8, generator=generator)


def _random(image_size: int, batch_size: int, why: str) -> SampleImages:
    side = -(-image_size // 32) * 32
    return SampleImages((random_images(batch_size, (side, side)),), f"random images: {why}", False)
