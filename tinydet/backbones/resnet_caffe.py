"""ResNet as Caffe's: a stage's stride is in its first 1x1 conv, not in the 3x3 conv after it.

This is the original (arXiv 1512.03385), which YOLOF's published detectors have. timm's and
torchvision's ResNets stride in the 3x3 conv: the same tensors, another function.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from timm.models.resnet import default_cfgs as timm_default_cfgs
from torch import nn

__all__ = ["resnet50_caffe", "resnet101_caffe"]

default_cfgs = generate_default_cfgs(
    {
        f"resnet{depth}_caffe": replace(
            timm_default_cfgs[f"resnet{depth}"].default, url="", hf_hub_id=None, tag=None
        )
        for depth in (50, 101)
    }
)


class CaffeResNet(ResNet):
    """timm's ResNet with the strides and, in dilated stages, the dilations of Caffe's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stages: Any = (self.layer1, self.layer2, self.layer3, self.layer4)
        for first, second, *_ in stages:
            first.conv1.stride, first.conv2.stride = first.conv2.stride, (1, 1)
            # timm's first block of a dilated stage keeps the dilation of the stage before.
            first.conv2.dilation, first.conv2.padding = second.conv2.dilation, second.conv2.padding


@register_model
def resnet50_caffe(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 (arXiv 1512.03385) with strides in 1x1 convs; timm has no weights for it."""
    return _build("resnet50_caffe", (3, 4, 6, 3), pretrained, kwargs)


@register_model
def resnet101_caffe(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 (arXiv 1512.03385) with strides in 1x1 convs; timm has no weights for it."""
    return _build("resnet101_caffe", (3, 4, 23, 3), pretrained, kwargs)


def _build(
    name: str, layers: tuple[int, ...], pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    return build_model_with_cfg(
        CaffeResNet, name, pretrained, block=Bottleneck, layers=layers, **kwargs
    )
