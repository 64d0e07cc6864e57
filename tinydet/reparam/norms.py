"""Batch norms in inference: their scale and shift, and what remains once these are folded."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

# By exact type: a subclass may override `forward`.
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    FrozenBatchNorm2d,
    *_INSTANCE_NORMS,
)
_BATCH_NORM_ACTS = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
_ANY_NORM = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
)


def is_norm(module: nn.Module) -> bool:
    """Return whether this is a norm: of a known class, or with running statistics."""
    if isinstance(module, _ANY_NORM):
        return True
    statistics = isinstance(getattr(module, "running_var", None), Tensor)
    return statistics and all(p.ndim == 1 for p in module.parameters())  # not a block with layers


def count_norms(model: nn.Module) -> int:
    """Return the number of normalization layers in a model."""
    return sum(is_norm(module) for module in model.modules())


def why_not_linear(norm: nn.Module) -> str | None:
    """Return why a norm is not a constant scale and shift in inference, or None if it is."""
    fixed = getattr(norm, "running_mean", None) is not None and norm.running_var is not None
    if type(norm) in _BATCH_NORMS + _BATCH_NORM_ACTS:
        if fixed:
            return None
        if type(norm) not in _INSTANCE_NORMS:
            return "it has no running statistics: it normalises with those of each batch"
    elif isinstance(norm, nn.modules.batchnorm._BatchNorm) or hasattr(norm, "running_var"):
        return f"{type(norm).__name__} is a batch norm of its own kind, with unknown arithmetic"
    return f"{type(norm).__name__} computes its statistics from each input"


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the (C,) scale and (C,) shift that a batch norm of any kind applies in inference."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def without_norm(norm: nn.Module) -> nn.Module:
    """Return the replacement of a folded norm: the identity, or its dropout and activation."""
    rest: list[Any] = [getattr(norm, "drop", None), getattr(norm, "act", None)]
    rest = [m for m in rest if m is not None and type(m) is not nn.Identity]
    if type(norm) in _BATCH_NORMS or not rest:
        return nn.Identity()
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest)
