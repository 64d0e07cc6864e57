"""Builds a backbone: any timm model, cut after one feature map, or after two that become one."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Format
from timm.models import FeatureInfo
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from tinydet.backbones.frozen import freeze_stages
from tinydet.backbones.weights import load_weights
from tinydet.config import ConfigError

# feature -> (strides of timm's maps, the map's own first; timm arguments)
_FEATURES: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "C5": ((32,), {}),
    "DC5": ((16,), {"output_stride": 16}),
    "C4": ((16,), {}),
    "P4": ((16, 32), {}),
}
# Arguments that make timm's fixed-size models accept any size; each model knows one or none.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"strict_img_size": False},
    {"dynamic_img_size": True},
    {},
)
# (height, width) in pixels: multiples of 32 with few common factors.
_CHECKED_SIZES = ((64, 96), (160, 128))


@dataclass
class Backbone:
    """A feature extractor and its properties.

    Attributes:
        module: maps (B, 3, H, W) normalized images to a list of one feature map (B, channels,
            H/stride, W/stride).
        channels: number of channels of the feature map.
        stride: stride of the feature map in input pixels.
        mean: mean of the normalization, for each channel in 0..1.
        std: standard deviation of the normalization, for each channel in 0..1.
        fixed: names of frozen modules (`tinydet.backbones.frozen`).
    """

    module: nn.Module
    channels: int
    stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fixed: tuple[str, ...] = ()


class MapAdapter(nn.Module):
    """Changes the feature maps that a timm model returns; adds no parameters.

    Args:
        body: the model.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body


class _ChannelsFirst(MapAdapter):
    """Turns the (B, H, W, C) feature maps of some timm models into (B, C, H, W)."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [rearrange(feature, "b h w c -> b c h w") for feature in self.body(x)]


class _OnFirst(MapAdapter):
    """Upsamples the second of two feature maps twofold and appends its channels to the first's.

    With the 1x1 conv of the encoder behind it, this is the sum of a feature pyramid's lateral and
    top-down paths (arXiv 1612.03144).
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        fine, coarse = self.body(x)
        return [torch.cat([fine, F.interpolate(coarse, scale_factor=2.0, mode="nearest")], dim=1)]


def check_backbone(name: str) -> None:
    """Check that timm knows a model name; nothing is built.

    Raises:
        ConfigError: it is unknown; the message suggests similar names.
    """
    base_name = name.split(".")[0]
    if not timm.is_model(base_name):
        near = difflib.get_close_matches(base_name, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists them"
        raise ConfigError(
            f"model.backbone={name}: timm {timm.__version__} has no such model{hint} (a model of "
            "your own must be registered by the experiment file)"
        )


def create_backbone(
    name: str,
    weights: str,
    feature: str,
    stages_fixed: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
) -> Backbone:
    """Build a timm backbone that returns one feature map.

    Args:
        name: a timm model name.
        weights: "imagenet", "random" or a file; see `tinydet.config.Model`.
        feature: "C5", "DC5", "C4" or "P4".
        stages_fixed: `model.freeze_stages`; see `tinydet.config.Model`.
        tensors: what the file holds, if it was read before.

    Raises:
        ConfigError: the model, feature or stage does not exist, the model does not take images of
            any size, or the weights are not available.
    """
    check_backbone(name)
    strides, kwargs = _FEATURES[feature]
    probe = _probe(name, feature, kwargs)
    reductions = [info["reduction"] for info in _feature_info(probe)]
    for stride in strides:
        if stride not in reductions:
            raise ConfigError(
                f"model.backbone={name}: no feature map of stride {stride} for model.feature="
                f"{feature}; its strides are {', '.join(map(str, sorted(set(reductions))))}"
            )
    # The last map of a stride is the deepest one.
    indices = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides)
    build = partial(_build, name, out_indices=indices, **kwargs)
    module = build()
    infos = [_feature_info(module)[index] for index in indices]
    if isinstance(module, (EfficientNetFeatures, MobileNetV3Features)):
        # timm's other wrappers do not build the stages after the last feature map.
        module.blocks = module.blocks[: infos[-1]["stage"]]
    config = cast(dict[str, Any], module.pretrained_cfg)
    own, prefix = module, ""
    if getattr(module, "output_fmt", None) == Format.NHWC:
        module, prefix = _ChannelsFirst(module), prefix + "body."
    if len(indices) > 1:
        module, prefix = _OnFirst(module), prefix + "body."
    channels = sum(info["num_chs"] for info in infos)
    backbone = Backbone(module, channels, strides[0], config["mean"], config["std"])
    _check_map(backbone, name, feature)
    load_weights(own, build, name, weights, tensors)
    if not stages_fixed:
        return backbone
    fixed = freeze_stages(own, partial(_build, name, **kwargs), stages_fixed, indices[-1])
    return replace(backbone, fixed=tuple(prefix + part for part in fixed))


def _check_map(backbone: Backbone, name: str, feature: str) -> None:
    """Check the shape of the feature map for two image sizes.

    A copy is used, since some modules cache what they compute for a size.

    Raises:
        ConfigError: the backbone fails on a size, or its map has an unexpected shape.
    """
    module = copy.deepcopy(backbone.module).eval()
    for height, width in _CHECKED_SIZES:
        rows, columns = -(-height // backbone.stride), -(-width // backbone.stride)
        wanted = (1, backbone.channels, rows, columns)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                (found,) = module(torch.zeros(1, 3, height, width))
            if found.shape == wanted:
                continue
            cause: Exception | None = None
            problem = f"it has the shape {tuple(found.shape)}"
        except Exception as error:  # timm's models raise many types.
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            cause, problem = error, first_line.rstrip(" :.")
        raise ConfigError(
            f"model.backbone={name}: does not take images of any size, which a detector needs. For "
            f"{height}x{width} pixels its {feature} map must have the shape {wanted}, but "
            f"{problem}. Choose another backbone, such as rexnet_100, resnet18 or convnext_atto"
        ) from cause


def _feature_info(module: nn.Module) -> list[dict[str, Any]]:
    return cast(FeatureInfo, module.feature_info).info


def _build(name: str, **kwargs: Any) -> nn.Module:
    """Call timm with the first of the `_ANY_SIZE` arguments that this model knows."""
    for any_size in _ANY_SIZE:
        try:
            return timm.create_model(name, features_only=True, **any_size, **kwargs)
        except TypeError:
            if not any_size:
                raise
    raise AssertionError("unreachable: the last choice has no arguments")


def _probe(name: str, feature: str, kwargs: dict[str, int]) -> nn.Module:
    try:
        return _build(name, **kwargs)
    except Exception as error:
        if kwargs:
            raise ConfigError(
                f"model.backbone={name}: timm cannot dilate it for model.feature={feature}; "
                "use C5 or C4, or a ResNet, RegNet, ConvNeXt, EfficientNet or CSPNet"
            ) from error
        raise ConfigError(
            f"model.backbone={name}: timm cannot build it with features_only: {error}"
        ) from error
