"""One way to build a backbone: any timm model, cut after one feature map."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, replace
from functools import partial

import timm
import torch
from einops import rearrange
from timm.layers import Format
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from tinydet.backbones.frozen import freeze_stages
from tinydet.backbones.weights import load_weights
from tinydet.config import ConfigError

# feature -> (reduction wanted, keyword that makes it)
_FEATURES = {"C5": (32, {}), "DC5": (16, {"output_stride": 16}), "C4": (16, {})}
# timm's models built for one input size take any with these, each where it knows the word.
_ANY_SIZE = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
# Height and width in pixels: multiples of 32 with few common factors.
_CHECKED_SIZES = ((64, 96), (160, 128))


@dataclass
class Backbone:
    """A feature extractor and what timm says of it.

    Attributes:
        module: (B, 3, H, W) normalised pixels to a list with one (B, channels, H/stride, W/stride).
        channels: of the feature map.
        stride: input pixels between neighbouring cells.
        mean: of the normalisation, per channel in 0..1.
        std: of the normalisation, per channel in 0..1.
        fixed: names of the modules that do not learn (`tinydet.backbones.frozen`).
    """

    module: nn.Module
    channels: int
    stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fixed: tuple[str, ...] = ()


class _ChannelsFirst(nn.Module):
    """Puts the channels of timm models that work in (B, H, W, C) where convs expect them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> list[Tensor]:
        return [rearrange(feature, "b h w c -> b c h w") for feature in self.body(x)]


def check_backbone(name: str) -> None:
    """Refuse a name that timm does not know; nothing is built.

    Raises:
        ConfigError: it is unknown; says the nearest names.
    """
    base_name = name.split(".")[0]
    if not timm.is_model(base_name):
        near = difflib.get_close_matches(base_name, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists them"
        raise ConfigError(
            f"model.backbone={name}: timm {timm.__version__} has no such model{hint} (one of your "
            "own is known once the experiment file that registers it is named)"
        )


def create_backbone(name: str, weights: str, feature: str, stages_fixed: int = 0) -> Backbone:
    """Build a timm backbone that returns one feature map.

    Args:
        name: a timm model name.
        weights: "imagenet", "random" or a file; see `tinydet.config.Model`.
        feature: "C5", "DC5" or "C4".
        stages_fixed: `model.freeze_stages`; see `tinydet.config.Model`.

    Raises:
        ConfigError: no such model, feature or stage, it takes images of some sizes only, or the
            weights cannot be had.
    """
    check_backbone(name)
    reduction, kwargs = _FEATURES[feature]
    probe = _probe(name, feature, kwargs)
    reductions = [info["reduction"] for info in probe.feature_info.info]
    if reduction not in reductions:
        raise ConfigError(
            f"model.backbone={name}: no feature map of stride {reduction} for model.feature="
            f"{feature}; its strides are {', '.join(map(str, sorted(set(reductions))))}"
        )
    # The last map of that stride is the deepest.
    index = len(reductions) - 1 - reductions[::-1].index(reduction)
    build = partial(_build, name, out_indices=(index,), **kwargs)
    module = build()
    info = module.feature_info.info[index]
    if isinstance(module, (EfficientNetFeatures, MobileNetV3Features)):
        # These two run stages that no feature needs; timm's other wrappers do not build them.
        module.blocks = module.blocks[: info["stage"]]
    config = module.pretrained_cfg
    own, is_nhwc = module, getattr(module, "output_fmt", None) == Format.NHWC
    if is_nhwc:
        module = _ChannelsFirst(module)
    backbone = Backbone(module, info["num_chs"], info["reduction"], config["mean"], config["std"])
    _check_map(backbone, name, feature)
    load_weights(own, build, name, weights)
    if not stages_fixed:
        return backbone
    fixed = freeze_stages(own, partial(_build, name, **kwargs), stages_fixed, index)
    return replace(backbone, fixed=tuple(f"body.{part}" if is_nhwc else part for part in fixed))


def _check_map(backbone: Backbone, name: str, feature: str) -> None:
    """Refuse a backbone whose map is not what the anchors are laid out for.

    A copy makes the map, for images of two sizes: some modules keep what they computed for a size.

    Raises:
        ConfigError: it takes images of some sizes only, or its map is of another shape.
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
            cause, problem = None, f"it has the shape {tuple(found.shape)}"
        except Exception as error:  # timm's models have many ways to say that they cannot.
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            cause, problem = error, first_line.rstrip(" :.")
        raise ConfigError(
            f"model.backbone={name}: does not take images of any size, as a detector's are. Of "
            f"{height}x{width} pixels its {feature} map must have the shape {wanted}, but "
            f"{problem}. Choose a backbone that does, such as rexnet_100, resnet18 or convnext_atto"
        ) from cause


def _build(name: str, **kwargs: object) -> nn.Module:
    """Call timm with the first of the `_ANY_SIZE` words that this model knows."""
    for any_size in _ANY_SIZE:
        try:
            return timm.create_model(name, features_only=True, **any_size, **kwargs)
        except TypeError:
            if not any_size:
                raise
    raise AssertionError("unreachable: the last choice has no words")


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
