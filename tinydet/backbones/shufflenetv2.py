"""ShuffleNetV2 for timm: torchvision's network and weights, under timm's interface.

timm has no ShuffleNet. Importing this module registers `shufflenetv2_x0_5`, `shufflenetv2_x1_0`,
`shufflenetv2_x1_5` and `shufflenetv2_x2_0` with it. Blocks and tensor names are torchvision's, so
its state dicts load strictly.

Paper: Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV
2018, https://arxiv.org/abs/1807.11164
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision.models as tv
from timm.layers import create_classifier, get_device_dtype
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

# Blocks of stage 2, 3 and 4; the same for all widths (paper, table 5).
_DEPTHS = [4, 8, 4]


class ShuffleNetV2(tv.ShuffleNetV2):
    """torchvision's ShuffleNetV2 with timm's interface of a classifier and backbone.

    There are five features: `conv1` (stride 2), `maxpool` (4) and the stages 2, 3 and 4 (8, 16 and
    32). The 1x1 `conv5` after them belongs to the classifier: it is part of `forward_features`, but
    of no intermediate feature, and `features_only` removes it.

    Args:
        channels: number of channels of `conv1`, the three stages and `conv5`.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the input.
        output_stride: 32, 16 or 8. Below 32 the last stages use dilation instead of stride, which
            computes the same values and those in between.
        global_pool: a pooling of timm's `SelectAdaptivePool2d`; "" for none.
        drop_rate: dropout probability before the classifier.
        device: device of the parameters; the default device if None.
        dtype: dtype of the parameters; the default dtype if None.

    Raises:
        ValueError: `output_stride` is not 32, 16 or 8.
    """

    def __init__(
        self,
        channels: list[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride}: ShuffleNetV2 supports 8, 16 or 32")
        super().__init__(_DEPTHS, channels)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = channels[-1]
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": channels[0], "reduction": 2, "module": "conv1"},
            {"num_chs": channels[0], "reduction": 4, "module": "maxpool"},
            *(
                {"num_chs": channels[i - 1], "reduction": min(2 ** (i + 1), output_stride)}
                | {"module": f"stage{i}"}
                for i in (2, 3, 4)
            ),
        ]
        if in_chans != 3:
            self.conv1[0] = nn.Conv2d(in_chans, channels[0], 3, 2, 1, bias=False)
        _dilate([self.stage2, self.stage3, self.stage4], output_stride)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of layer names, for layer-wise learning-rate decay.

        Args:
            coarse: groups are stages instead of blocks.
        """
        block = r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"
        # In timm, 99999 means "in the previous group".
        return {"stem": r"^conv1", "blocks": [(block, None), (r"^conv5", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the final linear layer; `nn.Identity` without classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new, randomly initialized one.

        Args:
            num_classes: its outputs; 0 for none.
            global_pool: a new pooling; None keeps the current one.
        """
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool, **get_device_dtype(self)
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final features and the selected intermediate ones.

        Args:
            x: (B, in_chans, H, W) normalized images.
            indices: indices of the features, 0 to 4; None for all, an int n for the last n.
            norm: unused, there is no final norm.
            stop_early: skip the layers after the last of `indices`.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Returns:
            `forward_features(x)`, or the last feature if stopped early, and a list of one
            (B, C, H/stride, W/stride) for each index.

        Raises:
            ValueError: `output_fmt` is not "NCHW".
        """
        del norm
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt}: ShuffleNetV2 supports NCHW only")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        count = last + 1 if stop_early else len(self.feature_info)
        for index, info in enumerate(self.feature_info[:count]):
            x = self._run(getattr(self, info["module"]), x)
            if index in taken:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        whole = count == len(self.feature_info)
        return (self.conv5(x) if whole else x), intermediates

    def forward_features(self, x: Tensor) -> Tensor:
        """Turn (B, in_chans, H, W) normalized images into (B, num_features, H/32, W/32)."""
        x = self.maxpool(self.conv1(x))
        for stage in (self.stage2, self.stage3, self.stage4):
            x = self._run(stage, x)
        return self.conv5(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Turn the final features into (B, num_classes) logits.

        Args:
            x: (B, num_features, H, W).
            pre_logits: return the pooled (B, num_features) instead.
        """
        x = self.global_pool(x)
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (B, in_chans, H, W) normalized images into (B, num_classes) logits."""
        return self.forward_head(self.forward_features(x))

    def _run(self, layers: nn.Module, x: Tensor) -> Tensor:
        again = self.grad_checkpointing and layers not in (self.conv1, self.maxpool)
        return checkpoint_seq(layers, x) if again else layers(x)


def _dilate(stages: list[nn.Sequential], output_stride: int) -> None:
    """Replace strides beyond `output_stride` by dilation; the first stage starts at stride 4."""
    stride, dilation = 4, 1
    for stage in stages:
        if stride < output_stride:
            stride *= 2
            continue
        for index, block in enumerate(stage):
            # The first block still reads the grid of the previous stage.
            spread = dilation if index == 0 else 2 * dilation
            # `block.stride` is kept: torchvision uses it to distinguish two kinds of blocks.
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    conv.stride = (1, 1)
                    conv.dilation = conv.padding = (spread, spread)
        dilation *= 2


def _cfg(weights: tv.WeightsEnum) -> dict[str, Any]:
    """Return timm's configuration of torchvision's weights and their evaluation."""
    preset = weights.transforms()
    return {
        "url": weights.url,
        "num_classes": len(weights.meta["categories"]),
        "input_size": (3, preset.crop_size[0], preset.crop_size[0]),
        "pool_size": (7, 7),
        "crop_pct": preset.crop_size[0] / preset.resize_size[0],
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "first_conv": "conv1.0",
        "classifier": "fc",
        "license": "bsd-3-clause",
        "origin_url": weights.meta["recipe"],
    }


default_cfgs = generate_default_cfgs(
    {
        "shufflenetv2_x0_5.tv_in1k": _cfg(tv.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1),
        "shufflenetv2_x1_0.tv_in1k": _cfg(tv.ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1),
        "shufflenetv2_x1_5.tv_in1k": _cfg(tv.ShuffleNet_V2_X1_5_Weights.IMAGENET1K_V1),
        "shufflenetv2_x2_0.tv_in1k": _cfg(tv.ShuffleNet_V2_X2_0_Weights.IMAGENET1K_V1),
    }
)


def _create(name: str, channels: list[int], pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(ShuffleNetV2, name, pretrained, channels=channels, **kwargs)


@register_model
def shufflenetv2_x0_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 with width 0.5; see `ShuffleNetV2` for the arguments."""
    return _create("shufflenetv2_x0_5", [24, 48, 96, 192, 1024], pretrained, **kwargs)


@register_model
def shufflenetv2_x1_0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2; see `ShuffleNetV2` for the arguments."""
    return _create("shufflenetv2_x1_0", [24, 116, 232, 464, 1024], pretrained, **kwargs)


@register_model
def shufflenetv2_x1_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 with width 1.5; see `ShuffleNetV2` for the arguments."""
    return _create("shufflenetv2_x1_5", [24, 176, 352, 704, 1024], pretrained, **kwargs)


@register_model
def shufflenetv2_x2_0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 with width 2; see `ShuffleNetV2` for the arguments."""
    return _create("shufflenetv2_x2_0", [24, 244, 488, 976, 2048], pretrained, **kwargs)
