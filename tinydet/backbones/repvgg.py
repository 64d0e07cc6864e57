"""RepVGG (arXiv 2101.03697): variants that timm lacks, and conversion of the authors' checkpoints.

timm's own A0 to A2, B0 to B3, B1g4, B2g4, B3g4 and D2se are used as they are. It has no variants
with two groups and no QARepVGG (arXiv 2212.01593), and cannot read the authors' files.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, RepVggBlock, model_cfgs
from timm.models.byobnet import default_cfgs as timm_default_cfgs
from torch import Tensor, nn

from tinydet.backbones.state_dict import without_prefix

# The authors' name of a block's part -> timm's.
_PARTS = {
    "rbr_dense.": "conv_kxk.",
    "rbr_1x1.": "conv_1x1.",
    "rbr_identity.": "identity.",
    "se.down.": "attn.fc1.",
    "se.up.": "attn.fc2.",
}
_FIRST = "stage0.rbr_dense.conv.weight"
_FIRST_DEPLOYED = "stage0.rbr_reparam.weight"
_TENSOR = re.compile(r"stage(?:0|([1-4])\.(\d+))\.(rbr_\w+\.|se\.\w+\.)(.+)")

default_cfgs = generate_default_cfgs(
    {
        # There are no weights for timm; the normalization is that of the variants with 4 groups.
        f"{name}g2": replace(timm_default_cfgs[f"{name}g4"].default, hf_hub_id=None, tag=None)
        for name in ("repvgg_b1", "repvgg_b2", "repvgg_b3")
    }
    | {
        f"qa{name}": replace(timm_default_cfgs[name].default, hf_hub_id=None, tag=None)
        for name in ("repvgg_a0", "repvgg_b0")
    }
)


def convert_official_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of the authors' RepVGG checkpoints as timm does.

    Args:
        state_dict: of the training form, with the authors' names (`stage0.rbr_dense.conv.weight`
            and so on, including D2se's), with or without a prefix such as DataParallel's
            `module.`. Any other names are assumed to be timm's.

    Returns:
        The same tensors under timm's names, in the same order; any other dict unchanged.

    Raises:
        ValueError: the checkpoint is of the deploy form, or has a name that RepVGG does not have.
    """
    found, _ = without_prefix(state_dict, (_FIRST, _FIRST_DEPLOYED))
    if _FIRST_DEPLOYED in found:
        raise ValueError(
            "this RepVGG checkpoint is of the deploy form (rbr_reparam): it is already folded and "
            "its branches are lost; give the training form (the authors' files named *-train.pth)"
        )
    if _FIRST not in found:
        return state_dict
    return {_timm_name(name): tensor for name, tensor in found.items()}


def _timm_name(name: str) -> str:
    if name in ("linear.weight", "linear.bias"):
        return name.replace("linear", "head.fc")
    match = _TENSOR.fullmatch(name)
    if match is None or match[3] not in _PARTS:
        raise ValueError(
            f"the authors' RepVGG has no tensor {name}; convert this checkpoint to the names of "
            "timm's model first"
        )
    stage, block, part, rest = match.groups()
    place = "stem" if stage is None else f"stages.{int(stage) - 1}.{block}"
    return f"{place}.{_PARTS[part]}{rest}"


@register_model
def repvgg_b1g2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B1g2: B1 with two groups in every second 3x3 (arXiv 2101.03697, section 4.1)."""
    return _two_groups("repvgg_b1", pretrained, **kwargs)


@register_model
def repvgg_b2g2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B2g2: B2 with two groups in every second 3x3, as in the authors' code."""
    return _two_groups("repvgg_b2", pretrained, **kwargs)


@register_model
def repvgg_b3g2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B3g2: B3 with two groups in every second 3x3, as in the authors' code."""
    return _two_groups("repvgg_b3", pretrained, **kwargs)


@register_model
def qarepvgg_a0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """QARepVGG-A0 (arXiv 2212.01593): RepVGG-A0 with the norm after the sum of the branches."""
    return _norms_after_sums(_build("qarepvgg_a0", model_cfgs["repvgg_a0"], pretrained, kwargs))


@register_model
def qarepvgg_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """QARepVGG-B0 (arXiv 2212.01593): RepVGG-B0 with the norm after the sum of the branches."""
    return _norms_after_sums(_build("qarepvgg_b0", model_cfgs["repvgg_b0"], pretrained, kwargs))


def _norms_after_sums(model: nn.Module) -> nn.Module:
    """Turn RepVGG into QARepVGG, in place (table 3 of the paper, S4).

    Only the 3x3 branch keeps its norm; the sum gets one. The identity's norm divides by the spread
    of each channel of the input, which decays to zero for channels that are rarely active: in
    inference the rare value is then far too large.
    """
    for module in model.modules():
        if isinstance(module, RepVggBlock):
            block = cast(Any, module)
            block.conv_kxk.bn.reset_parameters()
            block.conv_1x1.bn = nn.Identity()
            block.identity = None if block.identity is None else nn.Identity()
            # timm's place for an attention layer: between the sum and the activation.
            block.attn = nn.BatchNorm2d(block.conv_kxk.out_channels)
    return model


def _two_groups(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    whole = model_cfgs[name]
    stages = cast(tuple[ByoBlockCfg, ...], whole.blocks)
    blocks = tuple(replace(stage, gs=_group_size) for stage in stages)
    return _build(f"{name}g2", replace(whole, blocks=blocks), pretrained, kwargs)


def _build(
    name: str, model_cfg: ByoModelCfg, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    features = {"flatten_sequential": True}
    return build_model_with_cfg(
        ByobNet, name, pretrained, model_cfg=model_cfg, feature_cfg=features, **kwargs
    )


def _group_size(channels: int, index: int) -> int:
    # Every second layer of the network; since all depths are even, stages start with groups=1.
    return channels // 2 if index % 2 else 0
