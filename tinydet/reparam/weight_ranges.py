"""How unevenly the weights of a layer's output channels are scaled.

Folding a norm multiplies each output channel by its own factor. An int8 quantizer with one scale
for the whole weight then has few steps left for the small channels (arXiv 1906.04721, section 3.1,
where a channel's precision is its range divided by that of the whole weight). With a scale for each
output channel nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class WeightRange:
    """The range of one layer's weight, symmetric around zero.

    Attributes:
        name: the layer's qualified name.
        largest: largest absolute weight.
        spread: `largest` divided by the median over output channels of each channel's largest
            absolute weight. Of the 127 steps of int8 with one scale, a channel at the median has
            `127 / spread`. Channels that are all zero do not count; 1 where all channels are.
    """

    name: str
    largest: float
    spread: float


def weight_ranges(model: nn.Module) -> list[WeightRange]:
    """Return the ranges of the weights of all convolutions and linear layers, in order.

    Args:
        model: a network in any dtype, on any device.
    """
    found = []
    for name, module in model.named_modules():
        layer = isinstance(module, (_ConvNd, nn.Linear))
        weight = getattr(module, "weight", None) if layer else None
        if isinstance(weight, Tensor) and weight.numel():  # not where code computes it
            channels = _largest_by_channel(module).cpu().double()
            largest = channels.max().item()
            median = channels[channels > 0].quantile(0.5).item() if largest > 0 else 1.0
            found.append(WeightRange(name, largest, largest / median if largest > 0 else 1.0))
    return found


def _largest_by_channel(layer: _ConvNd | nn.Linear) -> Tensor:
    """Return the largest absolute weight of each output channel, (C_out,)."""
    weight = layer.weight.detach()
    if isinstance(layer, _ConvTransposeNd):  # (C_in, C_out / groups, ...)
        by_group = weight.view(layer.groups, -1, *weight.shape[1:])
        return by_group.abs().flatten(3).amax((1, 3)).flatten()
    return torch.maximum(weight.flatten(1).amax(1), -weight.flatten(1).amin(1))
