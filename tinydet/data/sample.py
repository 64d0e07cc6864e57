"""What the data hands to the detector: one Sample per image, one Batch per step.

Letters in shape comments: B images, N boxes of one image, H and W in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Sample:
    """One image with its boxes.

    Attributes:
        image: (3, H, W) uint8 RGB.
        boxes: (N, 4) float32 xyxy, 0-based pixels of `image`, x in [0, W] and y in [0, H].
        labels: (N,) int64 class indices.
        difficult: (N,) bool; left out of training targets, ignored by the VOC evaluation.
        image_id: name of the image in its split.
        size: (H, W) of the original image.
        scale: (sy, sx), network pixels per original pixel.
        unreadable: ids of images that could not be decoded, which this sample replaces.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    image_id: str
    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    unreadable: tuple[str, ...] = ()


@dataclass
class Batch:
    """Images of one step, padded to one shape.

    Attributes:
        images: (B, 3, H, W) uint8 RGB; H and W are multiples of 32, padding is on the right and
            at the bottom.
        targets: one dict per image with "boxes" (N, 4) float32 xyxy pixels of `images`, "labels"
            (N,) int64 and "difficult" (N,) bool. Training batches hold no difficult objects.
        image_ids: names of the images.
        sizes: (H, W) of the original images.
        scales: (sy, sx), network pixels per original pixel.
        unreadable: ids of images that could not be decoded and were replaced in this batch.
    """

    images: Tensor
    targets: list[dict[str, Tensor]]
    image_ids: list[str]
    sizes: list[tuple[int, int]]
    scales: list[tuple[float, float]]
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    # A tensor is sent between processes as an open file, in about 0.4 ms. That pays for images,
    # but three per target would cost more than the loader's other work. Arrays are sent by value.
    def __getstate__(self) -> dict[str, Any]:
        targets = [{k: v.numpy() for k, v in target.items()} for target in self.targets]
        return self.__dict__ | {"targets": targets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.targets = [
            {k: torch.from_numpy(v) for k, v in target.items()} for target in state["targets"]
        ]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`; a CUDA device copies them meanwhile."""
        # Only CUDA batches are pinned; on mps an asynchronous copy may read freed memory.
        non_blocking = torch.device(device).type == "cuda"
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            targets=[
                {k: v.to(device, non_blocking=non_blocking) for k, v in target.items()}
                for target in self.targets
            ],
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by DataLoader before copies to a GPU)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=[{k: v.pin_memory() for k, v in target.items()} for target in self.targets],
        )
