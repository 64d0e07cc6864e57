"""Coordinate Attention (arXiv 2103.02907) that can start as the identity."""

from __future__ import annotations

import torch
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn


class CoordinateAttention(CoordAttn):
    """timm's Coordinate Attention, at the paper's width and with a start that changes nothing.

    y = x * g_h * g_w, where the gate g_h of a row and g_w of a column come from the means of the
    rows and of the columns, by a shared layer of max(8, C / 32) units with batch norm and Hardswish
    and one more layer each. All convs have a bias, as in the authors' code.

    Added to a pretrained network, two sigmoids would start by quartering the activations. With
    `identity_start` the last two convs start at zero and the gates are 2 sigmoid(z), which is 1 at
    z = 0: the output is x exactly, not nearly so as with sigmoids of a large bias, and the gate has
    its steepest slope there (1/2) instead of a saturated one. 2 sigmoid(z) = 1 + tanh(z / 2), the
    gate of Gated Channel Transformation (arXiv 1909.11519), which starts from zeros for the same
    reason. Only the last convs learn at the very first step, the layer before them from the second;
    weight decay draws the block to the identity. A gate may also amplify, up to 2 a direction.

    Without it this is the paper's block, with its sigmoids and torch's usual weights: fit for
    training from scratch, or for the place of another gate such as squeeze-and-excitation.

    A map of one pixel works too, also in training with one sample, but batch norm then sees two
    equal values, so the gates do not depend on the input: use squeeze-and-excitation there.
    """

    def __init__(self, channels: int, reduction: int = 32, *, identity_start: bool = True) -> None:
        """Make the block.

        Args:
            channels: C, size of dimension 1 of the input.
            reduction: r of the paper; at least 8 units remain.
            identity_start: return the input itself before training; see above.

        Raises:
            ValueError: `channels` or `reduction` is not positive.
        """
        if channels < 1 or reduction < 1:
            raise ValueError(
                f"CoordinateAttention: channels is {channels}, reduction is {reduction}; "
                "give positive numbers"
            )
        super().__init__(
            channels,
            rd_channels=max(8, channels // reduction),
            bias=True,
            gate_layer=_TwiceSigmoid if identity_start else "sigmoid",
        )
        if identity_start:
            for last in (self.conv_h, self.conv_w):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)


class _TwiceSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(x)
