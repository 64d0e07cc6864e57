"""timm's models for the folding benchmarks: all their feature maps, or as classifiers.

A name is timm's own, for the feature maps, or with ":classifier" after it.
"""

from __future__ import annotations

import zlib

import timm
import torch
from random_weights import randomise
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

CLASSIFIER = ":classifier"
_LARGEST_INPUT = 256  # pixels a side, unless the network insists on more


def family_of(name: str) -> str:
    """Return the name of the timm module that defines a model."""
    return model_entrypoint(_own(name)).__module__.rpartition(".")[2]


def input_sizes(name: str) -> list[int]:
    """Return the input sides to try, in pixels, best first."""
    config = get_pretrained_cfg(_own(name))
    own = max(config.input_size[1:]) if config else 224
    return sorted({min(own, _LARGEST_INPUT), own})


def build_model(name: str) -> nn.Module:
    """Return a model in eval mode, float32, with weights that only its name decides.

    It returns all its feature maps; a classifier, and a model that cannot, returns its usual
    output. Call `settle_norms` before use.

    Raises:
        ValueError: timm has no such model.
    """
    if not timm.is_model(_own(name)):
        raise ValueError(f"{name}: timm has no such model")
    with torch.random.fork_rng(devices=[]):
        model = _classifier(name) if name.endswith(CLASSIFIER) else _features(name)
    randomise(model.eval(), seed_of(name))
    return model


def example_images(name: str, batch: int, height: int, width: int) -> Tensor:
    """Return (batch, 3, height, width) float32 noise that only the arguments decide."""
    generator = torch.Generator().manual_seed(seed_of(name) + 1)
    return torch.randn(batch, 3, height, width, generator=generator)


def seed_of(name: str) -> int:
    """Return the seed of a model's weights."""
    return zlib.crc32(name.encode())


def _features(name: str) -> nn.Module:
    torch.manual_seed(seed_of(name))
    try:
        return timm.create_model(name, features_only=True)
    except Exception:
        # timm has a different error for each of its ways to say that it cannot.
        return _classifier(name)


def _classifier(name: str) -> nn.Module:
    torch.manual_seed(seed_of(name))
    return timm.create_model(_own(name))


def _own(name: str) -> str:
    return name.removesuffix(CLASSIFIER)
