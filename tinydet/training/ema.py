"""Averaged weights: steadier than the last step's, and the ones evaluated and shipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of weights and buffers; `update_parameters` feeds it.

    The decay rises with the number n of updates as min(decay, (1 + n) / (10 + n)), so that a short
    run is not held back by its random start.
    """

    def update(means: list[Tensor], values: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        if means[0].is_floating_point():
            torch._foreach_lerp_(means, values, weight)
        else:
            torch._foreach_copy_(means, values)

    # AveragedModel hands over plain lists of one dtype and device each.
    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update), use_buffers=True)
