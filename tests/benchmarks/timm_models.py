"""The timm models that the folding benchmarks run on, and random weights that hide no mistake.

A newly built network is a poor test of a fold: its norms have mean 0 and variance 1, and its
LayerScales are close to zero. Here each of them gets random values of both signs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

_LARGEST_INPUT = 256  # pixels a side, unless the network insists on more


def choose_models(patterns: Sequence[str]) -> list[str]:
    """Return timm's models whose names match any of the patterns, sorted.

    Args:
        patterns: like "rexnet*"; none for a sample of every family that has batch norms.

    Raises:
        ValueError: a pattern matches no model.
    """
    if not patterns:
        return sorted(_sample())
    known = timm.list_models()
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"{pattern}: timm has no such model; try '*{pattern}*'")
        chosen.update(found)
    return sorted(chosen)


def family_of(name: str) -> str:
    """Return the name of the timm module that defines a model."""
    return model_entrypoint(name).__module__.rpartition(".")[2]


def input_sizes(name: str) -> list[int]:
    """Return the input sides to try, in pixels, best first."""
    if name in _sample():
        return [_sample()[name]]
    config = get_pretrained_cfg(name)
    own = max(config.input_size[1:]) if config else 224
    return sorted({min(own, _LARGEST_INPUT), own})


def build_model(name: str) -> nn.Module:
    """Return a model in eval mode, float32, with weights that only its name decides.

    It returns all its feature maps; one that cannot returns its usual output. Call `settle_norms`
    before use.

    Raises:
        ValueError: timm has no such model.
    """
    if not timm.is_model(name):
        raise ValueError(f"{name}: timm has no such model")
    seed = _seed(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, features_only=True)
        except Exception:
            # timm has a different error for each of its ways to say that it cannot.
            torch.manual_seed(seed)
            model = timm.create_model(name)
    randomise(model.eval(), seed)
    return model


def example_images(name: str, batch: int, height: int, width: int) -> Tensor:
    """Return (batch, 3, height, width) float32 noise that only the arguments decide."""
    generator = torch.Generator().manual_seed(_seed(name) + 1)
    return torch.randn(batch, 3, height, width, generator=generator)


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
def settle_norms(model: nn.Module, images: Tensor, seed: int) -> None:
    """Give each batch norm random statistics of the magnitude of its input.

    Statistics unrelated to the signal make it grow or vanish layer by layer. The exact statistics
    amplify rounding errors: deep in a random network channels hardly vary, and the norms divide by
    that small variance.

    Args:
        model: in eval mode; changed in place, in one forward pass.
        images: (B, 3, H, W) that pass through it.
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
        model(images)
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


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _sample() -> dict[str, int]:
    """Return the sampled models and the side of their input in pixels."""
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    return {name: int(side) for name, side in map(str.split, lines)}
