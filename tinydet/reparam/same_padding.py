"""TensorFlow's "same" padding, which depends on the input's size, apart from the conv it is for."""

from __future__ import annotations

from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn


class SamePad2d(nn.Module):
    """Pads as timm's Conv2dSame does, so that what follows is a conv without padding.

    Attributes:
        geometry: kernel size, stride and dilation of the conv it pads for.
    """

    def __init__(self, conv: Conv2dSame) -> None:
        """Take the geometry of a conv."""
        super().__init__()
        self.geometry = (conv.kernel_size, conv.stride, conv.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with zeros around it."""
        return pad_same(x, *self.geometry)

    def joined(self, conv: nn.Module) -> Conv2dSame | None:
        """Return a conv that follows this padding as timm's layer, itself changed to that class.

        None where the layer is no plain conv without padding, or one of another geometry.
        """
        if type(conv) is not nn.Conv2d or conv.padding != (0, 0):
            return None
        if (conv.kernel_size, conv.stride, conv.dilation) != self.geometry:
            return None
        conv.__class__ = Conv2dSame
        return conv
