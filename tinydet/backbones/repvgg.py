"""RepVGG (arXiv 2101.03697): the variants timm lacks, and the names of the authors' checkpoints.

timm builds A0 to A2, B0 to B3, B1g4, B2g4, B3g4 and D2se as the authors do, and dilates them with
`output_stride`; those are timm's own here. It has none with two groups, and cannot read the
authors' files.
"""

from __future__ import annotations

import re
from dataclasses import replace

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByobNet, model_cfgs
from timm.models.byobnet import default_cfgs as timm_default_cfgs
from torch import Tensor

from tinydet.backbones.tensor_names import without_prefix

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
        # Nobody publishes these for timm; the pixels are prepared as for their siblings.
        f"{name}g2": replace(timm_default_cfgs[f"{name}g4"].default, hf_hub_id=None, tag=None)
        for name in ("repvgg_b1", "repvgg_b2", "repvgg_b3")
    }
)


def convert_official_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of the authors' RepVGG checkpoints as timm does.

    Args:
        state_dict: of the training form, with the authors' names (`stage0.rbr_dense.conv.weight`
            and so on; D2se's too), with or without a prefix such as the `module.` of DataParallel.
            Any other names are taken for timm's.

    Returns:
        The same tensors under timm's names, in the same order; any other dict as it is.

    Raises:
        ValueError: the deploy form, whose branches are gone, or a name that RepVGG does not have.
    """
    found, _ = without_prefix(state_dict, (_FIRST, _FIRST_DEPLOYED))
    if _FIRST_DEPLOYED in found:
        raise ValueError(
            "this RepVGG checkpoint is the deploy form (rbr_reparam), already folded: its branches "
            "cannot be had back; give the training form (the authors' files named *-train.pth)"
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
            f"no RepVGG of the authors' has a tensor {name}; convert this checkpoint to the names "
            "of timm's model first"
        )
    stage, block, part, rest = match.groups()
    place = "stem" if stage is None else f"stages.{int(stage) - 1}.{block}"
    return f"{place}.{_PARTS[part]}{rest}"


@register_model
def repvgg_b1g2(pretrained: bool = False, **kwargs: object) -> ByobNet:
    """RepVGG-B1g2: B1 with two groups in every second 3x3 (arXiv 2101.03697, section 4.1)."""
    return _two_groups("repvgg_b1", pretrained, **kwargs)


@register_model
def repvgg_b2g2(pretrained: bool = False, **kwargs: object) -> ByobNet:
    """RepVGG-B2g2: B2 with two groups in every second 3x3; the authors' code has it."""
    return _two_groups("repvgg_b2", pretrained, **kwargs)


@register_model
def repvgg_b3g2(pretrained: bool = False, **kwargs: object) -> ByobNet:
    """RepVGG-B3g2: B3 with two groups in every second 3x3; the authors' code has it."""
    return _two_groups("repvgg_b3", pretrained, **kwargs)


def _two_groups(name: str, pretrained: bool, **kwargs: object) -> ByobNet:
    whole = model_cfgs[name]
    blocks = tuple(replace(stage, gs=_group_size) for stage in whole.blocks)
    return build_model_with_cfg(
        ByobNet,
        f"{name}g2",
        pretrained,
        model_cfg=replace(whole, blocks=blocks),
        feature_cfg={"flatten_sequential": True},
        **kwargs,
    )


def _group_size(channels: int, index: int) -> int:
    # Every second layer of the network: stages begin with an ungrouped one, all depths being even.
    return channels // 2 if index % 2 else 0
