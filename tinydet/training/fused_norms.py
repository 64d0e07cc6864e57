"""Frozen norms computed by the convs before them in training steps.

A frozen norm multiplies each channel by a number and adds another. The conv before it may do so
with its weight, which is far smaller than what it computes: the same function and gradients,
without two passes over the activations, which in bfloat16 would become float32.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.ops.misc import FrozenBatchNorm2d

from tinydet.backbones.module_trace import eval_mode
from tinydet.reparam import fold
from tinydet.reparam.expand import ExpandedConv2d
from tinydet.reparam.module_class import class_of, set_class, with_mixin
from tinydet.reparam.norms import scale_and_shift
from tinydet.training.folded_stages import EXAMPLE, check_maps

logger = logging.getLogger(__name__)


def fuse_frozen_norms(detector: nn.Module) -> None:
    """Let the convs of a detector's backbone compute the frozen norms after them.

    That is done where gradients are recorded, so evaluation stays as it is, and so do weights,
    names and the state dict. After other weights are loaded, call it again. Convs with branches and
    norms that are not behind a conv are left alone.

    Args:
        detector: a `tinydet.yolof.detector.Detector`; changed in place.
    """
    backbone: Any = getattr(detector, "backbone", None)
    if backbone is None:
        return
    undo_fused_norms(backbone)
    fixed = tuple(f"{name}." for name in getattr(detector, "fixed", ()))  # They are folded whole.
    modules = {n: m for n, m in backbone.named_modules() if not f"{n}.".startswith(fixed)}
    frozen = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
    if not any(isinstance(module, frozen) for module in modules.values()):
        return
    try:
        with eval_mode(backbone):
            _, report = fold(backbone, torch.zeros(EXAMPLE))
            for step in report.folded:
                norm = modules.get(step.name)
                conv = modules.get(step.detail.removeprefix("into "))
                if isinstance(norm, frozen) and isinstance(conv, nn.Conv2d) and _is_plain(conv):
                    _fuse(conv, norm)
            check_maps(backbone)
    except ValueError as error:
        logger.info("frozen norms stay as they are: %s", str(error).splitlines()[0])
        undo_fused_norms(backbone)


def undo_fused_norms(model: nn.Module) -> None:
    """Give the modules that `fuse_frozen_norms` changed their own classes again."""
    for module in model.modules():
        if isinstance(module, (_WithNorm, _Computed)):
            for name in ("norm_scale", "norm_shift"):
                module.__dict__.pop(name, None)
            set_class(module, module.__dict__.pop("own_class"))


def _is_plain(conv: nn.Conv2d) -> bool:
    return not isinstance(conv, ExpandedConv2d) and not parametrize.is_parametrized(conv)


def _fuse(conv: nn.Conv2d, norm: nn.Module) -> None:
    scale, shift = scale_and_shift(norm)
    # No members: neither in the state dict nor changed with the network.
    conv.__dict__["norm_scale"] = scale.detach().reshape(-1, 1, 1, 1)
    conv.__dict__["norm_shift"] = shift.detach()
    _change_class(conv, _WithNorm)
    _change_class(norm, _Computed)


def _change_class(module: nn.Module, change: type[nn.Module]) -> None:
    kind = class_of(module)
    set_class(module, with_mixin(change, kind))  # type: ignore[arg-type]
    module.__dict__["own_class"] = kind


class _WithNorm(nn.Module):
    """Mixin before a conv's class: weight and bias include the norm behind the conv."""

    @property
    def weight(self) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight * self.__dict__["norm_scale"] if torch.is_grad_enabled() else weight

    @property
    def bias(self) -> Tensor | None:
        bias = self._parameters["bias"]
        if not torch.is_grad_enabled():
            return bias
        shift: Tensor = self.__dict__["norm_shift"]
        return shift if bias is None else bias * self.__dict__["norm_scale"].flatten() + shift


class _Computed(nn.Module):
    """Mixin before a norm's class: the norm itself is computed already, its activation is not."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[no-any-return]
        if isinstance(self, FrozenBatchNormAct2d):
            return self.act(self.drop(x))  # type: ignore[no-any-return]
        return x
