"""A custom layer: a new activation for the quickstart's ResNet-18.

python tools/compare.py experiments/quickstart.py experiments/quickstart_leak.py
"""

from dataclasses import replace

import timm
import torch
from quickstart import experiment as base
from timm.models import register_model
from torch import nn


class Leak(nn.Module):
    """ReLU with a learned slope for negative values, initially 0."""

    def __init__(self, **_: bool) -> None:  # timm passes `inplace`
        super().__init__()
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map of the same shape."""
        return x.relu() + self.share * x.clamp(max=0)


@register_model
def resnet18_leak(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """ResNet-18 with `Leak` as its activation."""
    return timm.model_entrypoint("resnet18")(pretrained, act_layer=Leak, **kwargs)


experiment = replace(base, model=replace(base.model, backbone="resnet18_leak"))
