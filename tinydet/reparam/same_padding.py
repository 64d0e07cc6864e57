"""Padding that may be larger at the end than at the start, as a layer before its conv.

A conv has the same padding on both sides, except timm's Conv2dSame (TensorFlow's "same" padding,
which depends on the input's size) and `padding="same"` with an even kernel. At stride 1 these two
are one function.
"""

from __future__ import annotations

from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn


class SamePad2d(nn.Module):
    """Pads as a conv does, so that the conv without padding can follow.

    Attributes:
        geometry: kernel size, stride and dilation of the conv it pads for.
        padding: the conv's own: "same", or 0 for Conv2dSame.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Take the geometry of a conv that needs this layer."""
        super().__init__()
        self.geometry = (conv.kernel_size, conv.stride, conv.dilation)
        self.padding = conv.padding

    @staticmethod
    def needed_by(conv: nn.Conv2d) -> bool:
        """Return whether no padding in numbers is the conv's for all inputs."""
        odd = any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return isinstance(conv, Conv2dSame) or (conv.padding == "same" and odd)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with zeros around it."""
        kernel_size, stride, dilation = map(list, self.geometry)
        return pad_same(x, kernel_size, stride, dilation)

    def joined(self, conv: nn.Module) -> nn.Conv2d | None:
        """Return the conv that this padding and a conv without padding are; the conv is changed.

        None if it is not a plain conv without padding, or of another geometry.
        """
        if type(conv) is not nn.Conv2d or conv.padding != (0, 0):
            return None
        # The dilation of a single tap has no effect.
        dilation = tuple(
            own if taps == 1 else found
            for taps, own, found in zip(
                conv.kernel_size, self.geometry[2], conv.dilation, strict=True
            )
        )
        if (conv.kernel_size, conv.stride, dilation) != self.geometry:
            return None
        conv.dilation = self.geometry[2]
        if self.padding == "same":
            conv.padding = "same"
        else:
            conv.__class__ = Conv2dSame
        return conv
