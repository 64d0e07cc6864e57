"""Random weights that hide no mistake of a fold.

A newly built network is a poor test: its norms have mean 0 and variance 1, and its LayerScales are
close to zero. Here each of them gets random values of both signs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Fill norms, biases and parameters that start out constant with random values of order one.

    Constant ones are LayerScales and the like, and kernels that start at zero. Scales have both
    signs and stay away from zero, so that a deep network keeps its signal.

    Args:
        model: changed in place.
        seed: decides the values.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.normal_(std=0.5, generator=generator)
            elif _is_constant(parameter):
                parameter.copy_(_random_like(parameter, module, generator))
        for name, buffer in module.named_buffers(recurse=False):
            if name in ("weight", "bias") and buffer.ndim == 1:  # Of a frozen norm.
                buffer.copy_(_signed(buffer.shape, generator))


@torch.no_grad()
def settle_norms(model: nn.Module, *inputs: Any, seed: int) -> None:
    """Give each batch norm random statistics of the magnitude of its input.

    Statistics unrelated to the signal make it grow or vanish layer by layer. The exact statistics
    amplify rounding errors: deep in a random network channels hardly vary, and the norms divide by
    that small variance.

    Args:
        model: in eval mode; changed in place, in one forward pass.
        inputs: its positional arguments.
        seed: decides the values.
    """
    generator = torch.Generator().manual_seed(seed)

    def settle(norm: Any, args: tuple[Any, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1)  # (C, N)
        size = x.square().mean().clamp_min(1e-6)
        factor = torch.empty(2, len(x))
        factor[0].normal_(std=0.5, generator=generator)
        factor[1].uniform_(0.5, 2.0, generator=generator)
        norm.running_mean.copy_(size.sqrt() * factor[0])
        norm.running_var.copy_(size * factor[1])

    handles = [
        module.register_forward_pre_hook(settle)
        for module in model.modules()
        if getattr(module, "running_var", None) is not None
    ]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def _is_constant(parameter: Tensor) -> bool:
    return parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())


def _random_like(parameter: Tensor, owner: nn.Module, generator: torch.Generator) -> Tensor:
    if isinstance(owner, (nn.modules.conv._ConvNd, nn.Linear)):
        fan_in = max(1, parameter[0].numel())
        return torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    if sum(side > 1 for side in parameter.shape) <= 1:
        return _signed(parameter.shape, generator)
    return 0.5 * torch.randn(parameter.shape, generator=generator)


def _signed(shape: torch.Size, generator: torch.Generator) -> Tensor:
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return sign * torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
