"""Frozen stages of a backbone run in folded form while others learn.

Nothing is learned there and norms keep their statistics, so in a training step the stages may
compute their folded form: without norms and branches, and, as nothing runs backward, in bfloat16
throughout.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from tinydet.backbones.module_trace import eval_mode
from tinydet.reparam import fold
from tinydet.reparam.module_class import class_of, set_class, with_mixin

logger = logging.getLogger(__name__)

EXAMPLE = (2, 3, 64, 96)
_TOLERANCE = 1e-3  # of the largest value, in float32


def fold_frozen_stages(detector: nn.Module, memory_format: torch.memory_format) -> None:
    """Let a detector's frozen modules compute their folded form where gradients are recorded.

    Weights, names and state dict stay as they are, and so does evaluation, which records no
    gradients. After other weights are loaded, call it again.

    Args:
        detector: a `tinydet.yolof.detector.Detector`; changed in place. Without frozen modules, or
            if they cannot be folded, it stays as it is.
        memory_format: of the folded weights.
    """
    backbone = getattr(detector, "backbone", None)
    if backbone is None or not getattr(detector, "fixed", ()):
        return
    modules = [backbone.get_submodule(name) for name in detector.fixed]  # type: ignore[union-attr]
    _undo(modules)
    try:
        with eval_mode(backbone):
            folded, _ = fold(backbone, torch.zeros(EXAMPLE), " ".join(detector.fixed))  # type: ignore[arg-type]
            for name, module in zip(detector.fixed, modules, strict=True):  # type: ignore[arg-type]
                part = folded.get_submodule(name).requires_grad_(False)
                kind = class_of(module)
                set_class(module, with_mixin(_Folded, kind))  # type: ignore[arg-type]
                # No members: neither in the state dict nor changed with the network.
                module.__dict__["unfolded_class"] = kind
                module.__dict__["folded"] = part.to(memory_format=memory_format)
            check_maps(backbone)
    except ValueError as error:
        logger.info("frozen stages are not folded: %s", str(error).splitlines()[0])
        _undo(modules)


def is_folded(module: nn.Module) -> bool:
    """Return whether a module computes its folded form in training steps."""
    return "folded" in module.__dict__


class _Folded(nn.Module):
    """Mixin before a module's class: `folded`, no member, takes its place in training steps."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self.__dict__["folded"](*args, **kwargs)
        return super().forward(*args, **kwargs)


def _undo(modules: list[nn.Module]) -> None:
    for module in modules:
        if is_folded(module):
            del module.__dict__["folded"]
            set_class(module, module.__dict__.pop("unfolded_class"))


def check_maps(backbone: nn.Module) -> None:
    """Compare a backbone's maps where gradients are recorded and where they are not.

    Raises:
        ValueError: they differ.
    """
    weight = next(backbone.parameters())
    images = torch.randn(EXAMPLE, generator=torch.Generator().manual_seed(0))
    images = images.to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = backbone(images)
    with torch.enable_grad():
        found = backbone(images)
    for one, two in zip(expected, found, strict=True):
        apart = (one - two.detach()).abs().max()
        if not apart <= _TOLERANCE * one.abs().max():
            raise ValueError(f"their outputs differ by {apart:.1e}")
