"""Copy a network whose weights may be the results of computations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def deep_copy(model: Network, known: Mapping[Tensor, Tensor] | None = None) -> Network:
    """Return a deep copy, also of a network with weights that a hook computes in each call.

    `torch.nn.utils.weight_norm` and `spectral_norm` store such a weight as an attribute with a
    gradient function, which `copy.deepcopy` refuses. The copy has its value.

    Args:
        model: the network.
        known: tensors that are not copied, with what takes their places in the copy.
    """
    computed = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    )
    memo = {id(value): value.detach().clone() for value in computed}
    memo |= {id(tensor): other for tensor, other in (known or {}).items()}
    made = copy.deepcopy(model, memo)
    # torch.fx creates new containers for a graph's modules, in training mode.
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in made.named_modules():
        module.training = modes.get(name, made.training)
    return made
