"""The backbone of YOLOv5 (release 6.0 and later) as timm models: yolov5n, s, m, l and x.

The network follows the published configuration: a 6x6 stem, four stages of a strided conv
and a cross-stage-partial block (Wang et al. 2020, https://arxiv.org/abs/1911.11929), and a fast
spatial pyramid pooling at the end. There is no paper on YOLOv5 itself; the project is at
https://github.com/ultralytics/yolov5. This code was written from that description alone.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, ConvNormAct
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tinydet.backbones.yolov5_checkpoint import is_official, rename_official

_WIDTHS = (64, 128, 256, 512, 1024)  # channels of the stem and the four stages at width 1
_DEPTHS = (3, 6, 9, 3)  # bottlenecks in the four stages at depth 1

_Conv = partial(
    ConvNormAct, act_layer=nn.SiLU, norm_kwargs={"eps": 1e-3, "momentum": 0.03}
)  # YOLOv5's batch norms, not PyTorch's defaults


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 conv with the same number of channels, and a shortcut around them."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.reduce = _Conv(channels, channels, 1)
        self.conv = _Conv(channels, channels, 3, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of `x`, (B, C, H, W)."""
        return x + self.conv(self.reduce(x))


class CrossStagePartial(nn.Module):
    """YOLOv5's C3: two paths with half the channels, bottlenecks in one of them, and a 1x1 conv."""

    def __init__(self, channels: int, depth: int, dilation: int) -> None:
        super().__init__()
        half = channels // 2
        self.main = _Conv(channels, half, 1)
        self.side = _Conv(channels, half, 1)
        self.blocks = nn.Sequential(*(Bottleneck(half, dilation) for _ in range(depth)))
        self.merge = _Conv(2 * half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of `x`, (B, C, H, W)."""
        return self.merge(torch.cat([self.blocks(self.main(x)), self.side(x)], dim=1))


class FastPyramidPooling(nn.Module):
    """YOLOv5's SPPF: max pools of 5, 9 and 13 cells, each computed from the previous one.

    Spatial pyramid pooling is He et al. 2015, https://arxiv.org/abs/1406.4729.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        half = channels // 2
        self.reduce = _Conv(channels, half, 1)
        # Covers the same pixels at any stride. A dilated pool would too, but PyTorch limits the
        # padding of those, and padding with -inf ruins the ranges of a quantized network.
        self.pool = nn.MaxPool2d(4 * dilation + 1, stride=1, padding=2 * dilation)
        self.merge = _Conv(4 * half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of `x`, (B, C, H, W)."""
        x = self.reduce(x)
        five = self.pool(x)
        nine = self.pool(five)
        return self.merge(torch.cat([x, five, nine, self.pool(nine)], dim=1))


class YoloV5(nn.Module):
    """The backbone, with the interface of a timm classifier.

    Features have strides 2, 4, 8, 16 and 32; the last one follows the pyramid pooling. A smaller
    output stride is reached by dilation: before the pyramid pooling, every second cell (every
    fourth with stride 8) then equals a cell of the network with stride 32.

    Args:
        width: multiplier of the channels, which are rounded up to a multiple of 8.
        depth: multiplier of the number of bottlenecks in a stage.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling before the classifier.
        output_stride: stride of the last features in pixels: 32, 16 or 8.
        drop_rate: dropout probability before the classifier.
    """

    def __init__(
        self,
        width: float,
        depth: float,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride}: YOLOv5 supports 8, 16 or 32")
        widths = [8 * math.ceil(channels * width / 8) for channels in _WIDTHS]
        depths = [max(round(count * depth), 1) for count in _DEPTHS]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False

        self.stem = _Conv(in_chans, widths[0], 6, stride=2, padding=2)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": widths[0], "reduction": 2, "module": "stem"}
        ]
        stages = []
        reduction, dilation = 2, 1
        for i, (channels, count) in enumerate(zip(widths[1:], depths, strict=True)):
            stride = 2 if reduction < output_stride else 1
            stage = nn.Sequential()
            # A conv that loses its stride still reads the previous grid, with its dilation.
            down = _Conv(widths[i], channels, 3, stride=stride, dilation=dilation)
            reduction, dilation = reduction * stride, dilation * 2 // stride
            stage.add_module("downsample", down)
            stage.add_module("csp", CrossStagePartial(channels, count, dilation))
            if i == 3:
                stage.add_module("pyramid", FastPyramidPooling(channels, dilation))
            stages.append(stage)
            self.feature_info.append(
                {"num_chs": channels, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = widths[-1]
        self.head = ClassifierHead(widths[-1], num_classes, global_pool, drop_rate)
        _initialize(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:  # noqa: ARG002 - timm's
        """Return patterns of layer names, for layer-wise learning-rate decay."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,  # noqa: ARG002 - timm's signature
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the selected features, preceded by the last one unless `intermediates_only`.

        Args:
            x: (B, in_chans, H, W) normalized images.
            indices: indices of the features, 0 to 4; None for all, an int n for the last n.
            norm: unused, there is no final norm.
            stop_early: skip the stages after the last selected one.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt}: YOLOv5 supports NCHW only")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        features = [x]
        for stage in self.stages[:last] if stop_early else self.stages:
            x = stage(x)
            features.append(x)
        chosen = [features[i] for i in wanted]
        return chosen if intermediates_only else (x, chosen)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,  # noqa: ARG002 - timm's signature
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of the features `indices`, and the classifier."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[:last]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last features, (B, C, H/stride, W/stride)."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes), or the pooled features (B, C)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a checkpoint's tensors to the model's names; timm calls this before loading.

    Args:
        state_dict: of a whole YOLOv5 detector with its official names, or of this model.
        model: the model to load into.

    Raises:
        ValueError: a tensor of the backbone is missing, which timm would leave random.
    """
    renamed = rename_official(state_dict) if is_official(state_dict) else state_dict
    missing = [
        name
        for name in model.state_dict()
        if name not in renamed and not name.startswith("head.") and "num_batches" not in name
    ]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors of this YOLOv5 backbone, e.g. "
            f"{missing[0]}; is it of another size (n, s, m, l, x)?"
        )
    return renamed


def _create(name: str, pretrained: bool, width: float, depth: float, **kwargs: Any) -> YoloV5:
    return build_model_with_cfg(
        YoloV5,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        width=width,
        depth=depth,
        **kwargs,
    )


# Pixels are only divided by 255. There are no weights on timm's hub; the official ones, under the
# AGPL, are read by `yolov5_checkpoint.convert_official`.
_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 640, 640),
    "pool_size": (20, 20),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "first_conv": "stem.conv",
    "classifier": "head.fc",
}
default_cfgs = generate_default_cfgs({f"yolov5{size}.untrained": _CFG for size in "nsmlx"})


@register_model
def yolov5n(pretrained: bool = False, **kwargs: Any) -> YoloV5:
    """YOLOv5 nano: width 0.25, depth 0.33."""
    return _create("yolov5n", pretrained, width=0.25, depth=0.33, **kwargs)


@register_model
def yolov5s(pretrained: bool = False, **kwargs: Any) -> YoloV5:
    """YOLOv5 small: width 0.5, depth 0.33."""
    return _create("yolov5s", pretrained, width=0.5, depth=0.33, **kwargs)


@register_model
def yolov5m(pretrained: bool = False, **kwargs: Any) -> YoloV5:
    """YOLOv5 medium: width 0.75, depth 0.67."""
    return _create("yolov5m", pretrained, width=0.75, depth=0.67, **kwargs)


@register_model
def yolov5l(pretrained: bool = False, **kwargs: Any) -> YoloV5:
    """YOLOv5 large: width 1, depth 1."""
    return _create("yolov5l", pretrained, width=1.0, depth=1.0, **kwargs)


@register_model
def yolov5x(pretrained: bool = False, **kwargs: Any) -> YoloV5:
    """YOLOv5 extra large: width 1.25, depth 1.33."""
    return _create("yolov5x", pretrained, width=1.25, depth=1.33, **kwargs)
