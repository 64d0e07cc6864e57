"""Small layers that timm and torch lack: activations and attention, ready for pretrained networks.

The activations start at or near one in common use and the attention, unless told otherwise, as the
identity, so that a pretrained network still works at the first step of fine-tuning.
"""

from tinydet.layers.acon import AconA, AconB, AconC, MetaAcon
from tinydet.layers.coord_attention import CoordinateAttention

__all__ = ["AconA", "AconB", "AconC", "CoordinateAttention", "MetaAcon"]
