"""A custom layer: a new activation for the quickstart's pretrained EfficientNet-Lite0.

python tools/compare.py experiments/quickstart.py experiments/quickstart_leak.py
"""

from dataclasses import replace

import timm
import torch
from quickstart import experiment as base
from timm.models import register_model
from torch import nn


class Leak(nn.Module):
    """ReLU6 with a learned slope for negative values, initially 0."""

    def __init__(self, **_: bool) -> None:  # timm passes `inplace`
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map of the same shape."""
        return x.clamp(0, 6) + self.slope * x.clamp(max=0)


@register_model
def lite0_leak(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """EfficientNet-Lite0 with `Leak` as its activation."""
    return timm.model_entrypoint("tf_efficientnet_lite0")(pretrained, act_layer=Leak, **kwargs)


experiment = replace(base, model=replace(base.model, backbone="lite0_leak"))
