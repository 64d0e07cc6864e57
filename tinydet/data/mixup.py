"""Mixup of two pictures and all their objects (arXiv 1710.09412, for detection 1902.04103)."""

from __future__ import annotations

from dataclasses import replace

import torch

from tinydet.data.sample import Sample
from tinydet.data.seeding import uniform

# Near a half: every object stays visible, so that every object can be a full target.
_SHARE = (0.4, 0.6)


def mixed(first: Sample, second: Sample, generator: torch.Generator) -> Sample:
    """Return two samples of one shape blended, with the boxes of both; name and size are `first`'s.

    Args:
        first: its share of each pixel is drawn from [0.4, 0.6).
        second: has the rest.
        generator: the share is drawn from it.
    """
    share = uniform(generator, *_SHARE)
    image = torch.lerp(second.image.float(), first.image.float(), share).round_().byte()
    return replace(
        first,
        image=image,
        boxes=torch.cat([first.boxes, second.boxes]),
        labels=torch.cat([first.labels, second.labels]),
        difficult=torch.cat([first.difficult, second.difficult]),
        unreadable=first.unreadable + second.unreadable,
    )
