"""TensorFlow's "same" padding, which depends on the input's size, as a layer before its conv."""

from __future__ import annotations

from typing import cast

from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn


class SamePad2d(nn.Module):
    """Pads as timm's Conv2dSame does, so that a conv without padding can follow.

    Attributes:
        geometry: kernel size, stride and dilation of the conv it pads for.
    """

    def __init__(self, conv: Conv2dSame) -> None:
        """Take the geometry of a conv."""
        super().__init__()
        self.geometry = (conv.kernel_size, conv.stride, conv.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with zeros around it."""
        kernel_size, stride, dilation = map(list, self.geometry)
        return pad_same(x, kernel_size, stride, dilation)

    def joined(self, conv: nn.Module) -> Conv2dSame | None:
        """Return a conv that follows this padding as a Conv2dSame; the conv's class is changed.

        None if it is not a plain conv without padding, or of another geometry.
        """
        if type(conv) is not nn.Conv2d or conv.padding != (0, 0):
            return None
        if (conv.kernel_size, conv.stride, conv.dilation) != self.geometry:
            return None
        conv.__class__ = Conv2dSame
        return cast(Conv2dSame, conv)
