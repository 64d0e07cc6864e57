"""Activations and attention layers that timm and torch lack, for use in pretrained networks.

The activations start equal or close to common ones, and the attention by default as the identity,
so that a pretrained network still works at the first step of fine-tuning.
"""

from tinydet.layers.acon import AconA, AconB, AconC, MetaAcon
from tinydet.layers.coord_attention import CoordinateAttention

__all__ = ["AconA", "AconB", "AconC", "CoordinateAttention", "MetaAcon"]
