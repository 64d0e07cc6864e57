"""Variants that people look for by name, registered with timm: one idea on one of timm's models.

Any other idea on any other model is a line of an experiment: `model.activation`, `model.attention`
and `model.expand`.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import register_model
from torch import nn

from tinydet.backbones.surgery import add_attention, replace_activation
from tinydet.reparam.expand import expand


def _example(options: dict[str, Any]) -> torch.Tensor:
    return torch.zeros(1, options.get("in_chans", 3), 128, 128)


def _base(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    # The entry point and not create_model: timm has parsed the options already.
    return timm.model_entrypoint(name)(pretrained=pretrained, **options)


@register_model
def rexnet_100_acon(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ReXNet-1.0 (arXiv 2007.00992) with ACON-C (arXiv 2009.04759) for its activations."""
    model = _base("rexnet_100", pretrained, kwargs)
    return replace_activation(model, "acon-c", _example(kwargs))


@register_model
def rexnet_100_coordatt(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ReXNet-1.0 with Coordinate Attention (arXiv 2103.02907) in place of its SE layers."""
    model = _base("rexnet_100", pretrained, kwargs)
    return add_attention(model, "coord", _example(kwargs), "se")


@register_model
def mobilenetv3_large_100_coordatt(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV3-L (arXiv 1905.02244) with Coordinate Attention in place of its SE layers."""
    model = _base("mobilenetv3_large_100", pretrained, kwargs)
    return add_attention(model, "coord", _example(kwargs), "se")


@register_model
def repvgg_a0_dbb(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-A0 (arXiv 2101.03697) with Diverse Branch Blocks (arXiv 2103.13425) on all 3x3."""
    return expand(_base("repvgg_a0", pretrained, kwargs), "dbb", "3x3")
