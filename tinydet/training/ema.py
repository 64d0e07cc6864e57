"""Exponential moving average of the weights, which is evaluated and deployed."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class AveragedWeights(Generic[NetworkT]):
    """An exponential moving average of a network's weights and buffers.

    The decay rises with the number n of updates as min(decay, (1 + n) / (10 + n)), so that the
    random start does not weigh on a short run; the first update copies. torch's `AveragedModel`
    regroups the tensors in every update, which takes five times as long for a small network.

    Attributes:
        module: a copy of the network, holding the averages.
        updates: made so far.

    Args:
        network: what is averaged; its tensors must stay the same objects after the first update.
        decay: of the average, in [0, 1).
    """

    def __init__(self, network: NetworkT, decay: float) -> None:
        self.module = deepcopy(network)
        self.updates = 0
        self._network = network
        self._decay = decay
        self._floats: tuple[list[Tensor], list[Tensor]] | None = None
        self._counters: tuple[list[Tensor], list[Tensor]] = ([], [])

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages; integer buffers are copied."""
        if self._floats is None:
            self._floats = ([], [])
            for mean, value in zip(_tensors(self.module), _tensors(self._network), strict=True):
                means, values = self._floats if mean.is_floating_point() else self._counters
                means.append(mean)
                values.append(value)
        n = self.updates
        weight = 1 - min(self._decay, (1 + n) / (10 + n)) if n else 1.0
        torch._foreach_lerp_(*self._floats, weight)
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)
        self.updates += 1


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
