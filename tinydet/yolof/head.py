"""YOLOF's decoder: a classification tower, a regression tower and an implicit objectness.

B images, A anchors (H * W * anchors per cell), K classes.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

# exp() of either logit is clamped to this before the logarithm, as in the reference.
_MAX_EXP_LOGIT = math.log(1e8)
# Initial probability of a positive (focal loss, arXiv 1708.02002, section 4.1).
_PRIOR = 0.01


class Head(nn.Module):
    """Two towers of 3x3 conv-BN-ReLU; objectness is predicted from the regression tower.

    Source: arXiv 2103.09460, section 4. Objectness has no loss of its own: it is multiplied into
    the class probability and learns from the classification loss alone.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        anchors_per_cell: int,
        cls_convs: int = 2,
        reg_convs: int = 4,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cls_tower = _tower(channels, cls_convs)
        self.reg_tower = _tower(channels, reg_convs)
        self.cls_score = nn.Conv2d(channels, anchors_per_cell * num_classes, 3, padding=1)
        self.box_delta = nn.Conv2d(channels, anchors_per_cell * 4, 3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.cls_score.bias is not None
        nn.init.constant_(self.cls_score.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, channels, H, W) to cls_logits (B, A, K) and deltas (B, A, 4)."""
        cls_features = self.cls_tower(x)
        reg_features = self.reg_tower(x)
        # Channels are ordered by anchor, then class; anchors by (y, x, side) as in make_anchors.
        cls_logits = rearrange(
            self.cls_score(cls_features), "b (a k) h w -> b (h w a) k", k=self.num_classes
        )
        obj_logits = rearrange(self.objectness(reg_features), "b a h w -> b (h w a) 1")
        deltas = rearrange(self.box_delta(reg_features), "b (a d) h w -> b (h w a) d", d=4)
        fused = fuse_objectness(_at_least_float32(cls_logits), _at_least_float32(obj_logits))
        return fused, _at_least_float32(deltas)


def fuse_objectness(cls_logits: Tensor, obj_logits: Tensor) -> Tensor:
    """Return the logit whose sigmoid is sigmoid(cls) * sigmoid(obj).

    c + o - log(1 + e^c + e^o), with e^c and e^o clamped to 1e8, which overflows in float16.
    """
    capped = cls_logits.clamp(max=_MAX_EXP_LOGIT).exp() + obj_logits.clamp(max=_MAX_EXP_LOGIT).exp()
    return cls_logits + obj_logits - torch.log1p(capped)


def _at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision, too inaccurate for logits and pixels, to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _tower(channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
