"""Coordinate Attention (arXiv 2103.02907) that can start as the identity."""

from __future__ import annotations

import torch
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn


class CoordinateAttention(CoordAttn):
    """timm's Coordinate Attention with the paper's width and an optional start as the identity.

    y = x * g_h * g_w, where the gates g_h of rows and g_w of columns are computed from the means of
    the rows and columns by a shared layer of max(8, C / 32) units with batch norm and Hardswish,
    followed by one layer for each. All convs have a bias, as in the authors' code.

    In a pretrained network, two sigmoids would initially reduce the activations to a quarter. With
    `identity_start` the last two convs start at zero and the gates are 2 sigmoid(z), which is 1 at
    z = 0. The output is then exactly x, unlike with sigmoids of a large bias, and the gate has its
    steepest slope there (1/2) instead of being saturated. 2 sigmoid(z) = 1 + tanh(z / 2) is the
    gate of Gated Channel Transformation (arXiv 1909.11519), which also starts from zeros. In the
    first step only the last convs receive a gradient, the layer before them from the second
    step on. Weight decay pulls the block towards the identity. Each gate can amplify by up to 2.

    Without it this is the paper's block, with sigmoids and torch's default weights, for training
    from scratch or in place of another gate such as squeeze-and-excitation.

    Maps of one pixel are supported, also in training with one sample, but batch norm then sees two
    equal values and the gates do not depend on the input: use squeeze-and-excitation there.
    """

    def __init__(self, channels: int, reduction: int = 32, *, identity_start: bool = True) -> None:
        """Create the block.

        Args:
            channels: C, size of dimension 1 of the input.
            reduction: r of the paper; there are at least 8 hidden units.
            identity_start: return the input unchanged before training; see above.

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
                if last.bias is not None:
                    nn.init.zeros_(last.bias)


class _TwiceSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(x)
