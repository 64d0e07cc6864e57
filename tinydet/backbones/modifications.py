"""Modifications of a backbone: those an experiment names, and variants registered with timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.models import register_model
from torch import nn

from tinydet.backbones.factory import MapAdapter
from tinydet.backbones.frozen import check_not_modified
from tinydet.backbones.surgery import add_attention, replace_activation
from tinydet.config import ConfigError, Model
from tinydet.reparam.expand import expand

# Large enough that the deepest map of stride 32 has more than one pixel.
_SIZE = 128


def apply_modifications(module: nn.Module, config: Model, fixed: Sequence[str] = ()) -> nn.Module:
    """Return a backbone with the modifications that an experiment names.

    They are applied in the order frozen norms, activation, attention, expand. Each starts as
    (nearly) the function it replaces, so that pretrained weights stay useful; modules that are not
    modified keep their names and weights. Places have timm's names, whatever the feature is.

    Frozen norms are timm's `FrozenBatchNorm2d`, a module of its own that computes the same in both
    modes, and not norms kept in eval mode as in fixed stages: the former have no parameters and no
    `num_batches_tracked`, and checkpoints have the keys to match.

    Args:
        module: the backbone with its weights; only frozen norms modify it in place, and a
            `MapAdapter` gets the modified model as its body.
        config: the experiment's model.
        fixed: names of its modules that do not learn.

    Raises:
        ConfigError: the backbone has no place for a modification or only places that do not learn,
            or a place is named without a modification.
    """
    if isinstance(module, MapAdapter):
        inside = [name.removeprefix("body.") for name in fixed]
        module.body = apply_modifications(module.body, config, inside)
        return module
    if config.freeze_norms:
        module = freeze_batch_norm_2d(module)
    for field, example in (("activation", "acon-c"), ("attention", "coord"), ("expand", "dbb")):
        kind, where = getattr(config, field), getattr(config, f"{field}_where")
        if kind == "none":
            options = [(f"{field}_where", where)]
            if field == "expand":
                options += [("expand_online", config.expand_online and "true")]
                options += [("expand_scale", config.expand_scale)]
            for name, value in options:
                if value:
                    raise ConfigError(
                        f"model.{name}={value}: has no effect without model.{field}, "
                        f"e.g. model.{field}={example}"
                    )
            continue
        try:
            module = _apply(module, field, kind, where, config)
            check_not_modified(module, fixed)
        except ValueError as error:
            raise ConfigError(f"model.{field}={kind}, model.{field}_where: {error}") from error
    return module


def _apply(module: nn.Module, field: str, kind: str, where: str, config: Model) -> nn.Module:
    if field == "expand":
        return expand(module, kind, where, config.expand_online, config.expand_scale)
    if field == "activation":
        return replace_activation(module, kind, _example(), where)
    return add_attention(module, kind, _example(), config.attention_place, where)


def _example(in_chans: int = 3) -> torch.Tensor:
    return torch.zeros(1, in_chans, _SIZE, _SIZE)


def _base(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    # The entry point, not create_model: timm has parsed the options already.
    return timm.model_entrypoint(name)(pretrained=pretrained, **options)


@register_model
def rexnet_100_acon(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ReXNet-1.0 (arXiv 2007.00992) with ACON-C activations (arXiv 2009.04759)."""
    model = _base("rexnet_100", pretrained, kwargs)
    return replace_activation(model, "acon-c", _example(kwargs.get("in_chans", 3)))


@register_model
def rexnet_100_coordatt(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ReXNet-1.0 with Coordinate Attention (arXiv 2103.02907) in place of its SE layers."""
    model = _base("rexnet_100", pretrained, kwargs)
    return add_attention(model, "coord", _example(kwargs.get("in_chans", 3)), "se")


@register_model
def mobilenetv3_large_100_coordatt(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV3-L (arXiv 1905.02244) with Coordinate Attention in place of its SE layers."""
    model = _base("mobilenetv3_large_100", pretrained, kwargs)
    return add_attention(model, "coord", _example(kwargs.get("in_chans", 3)), "se")


@register_model
def repvgg_a0_dbb(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-A0 (arXiv 2101.03697) with Diverse Branch Blocks (arXiv 2103.13425) on all 3x3."""
    return expand(_base("repvgg_a0", pretrained, kwargs), "dbb", "3x3")
