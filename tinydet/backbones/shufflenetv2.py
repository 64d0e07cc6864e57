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
    """torchvision's ShuffleNetV2 with what timm asks of a classifier and of a backbone.

    There are five features: `conv1` (stride 2), `maxpool` (4) and the stages 2, 3 and 4 (8, 16 and
    32). The 1x1 `conv5` after them belongs to the classifier: `forward_features` includes it, and
    no intermediate feature does; with `features_only` it is dropped.

    Args:
        channels: of `conv1`, the three stages and `conv5`.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the input.
        output_stride: 32, 16 or 8. Below 32 the last stages dilate instead of striding, which
            computes the same values and those between them.
        global_pool: a pooling of timm's `SelectAdaptivePool2d`; "" for none.
        drop_rate: probability of dropping a pooled value before the classifier, 0..1.
        device: where the parameters live; the default device if None.
        dtype: of the parameters; the default dtype if None.

    Raises:
        ValueError: another `output_stride`.
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
            raise ValueError(f"output_stride={output_stride}: ShuffleNetV2 takes 8, 16 or 32")
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
        """Return the patterns that sort parameters into groups, from input to output.

        Args:
            coarse: a group is a stage, not a block.
        """
        block = r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"
        # 99999 is timm's word for "with the group before".
        return {"stem": r"^conv1", "blocks": [(block, None), (r"^conv5", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: compute the blocks' activations again in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last, linear layer; `nn.Identity` with no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new, random one.

        Args:
            num_classes: its outputs; 0 for none.
            global_pool: a new pooling; None keeps the present one.
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
        """Return the final features and those on the way to them.

        Args:
            x: (B, in_chans, H, W) normalised pixels.
            indices: which of the five features; an int for the last so many, None for all.
            norm: has no effect, there is no final norm; timm passes it.
            stop_early: run nothing after the last of `indices`.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Returns:
            `forward_features(x)`, or the last feature if that made it stop early, and one
            (B, C, H/stride, W/stride) for each index.

        Raises:
            ValueError: another `output_fmt`.
        """
        del norm
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt}: ShuffleNetV2 gives NCHW")
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
        """Turn (B, in_chans, H, W) normalised pixels into (B, num_features, H/32, W/32)."""
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
        """Turn (B, in_chans, H, W) normalised pixels into (B, num_classes) logits."""
        return self.forward_head(self.forward_features(x))

    def _run(self, layers: nn.Module, x: Tensor) -> Tensor:
        again = self.grad_checkpointing and layers not in (self.conv1, self.maxpool)
        return checkpoint_seq(layers, x) if again else layers(x)


def _dilate(stages: list[nn.Sequential], output_stride: int) -> None:
    """Keep the stages, which start at stride 4, from striding beyond `output_stride`."""
    stride, dilation = 4, 1
    for stage in stages:
        if stride < output_stride:
            stride *= 2
            continue
        for index, block in enumerate(stage):
            # The first block still reads the grid of the stage before it.
            spread = dilation if index == 0 else 2 * dilation
            # `block.stride` stays: torchvision tells the two kinds of block apart by it.
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    conv.stride = (1, 1)
                    conv.dilation = conv.padding = (spread, spread)
        dilation *= 2


def _cfg(weights: tv.WeightsEnum) -> dict[str, Any]:
    """Describe torchvision's weights, and how it evaluates them, in timm's words."""
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
    """ShuffleNetV2 of half width; see `ShuffleNetV2` for the arguments."""
    return _create("shufflenetv2_x0_5", [24, 48, 96, 192, 1024], pretrained, **kwargs)


@register_model
def shufflenetv2_x1_0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2; see `ShuffleNetV2` for the arguments."""
    return _create("shufflenetv2_x1_0", [24, 116, 232, 464, 1024], pretrained, **kwargs)


@register_model
def shufflenetv2_x1_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 of width 1.5; see `ShuffleNetV2` for the arguments."""
    return _create("shufflenetv2_x1_5", [24, 176, 352, 704, 1024], pretrained, **kwargs)


@register_model
def shufflenetv2_x2_0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 of double width; see `ShuffleNetV2` for the arguments."""
    return _create("shufflenetv2_x2_0", [24, 244, 488, 976, 2048], pretrained, **kwargs)
