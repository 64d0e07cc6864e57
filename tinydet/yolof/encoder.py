"""YOLOF's dilated encoder, which covers several receptive fields with one feature map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class DilatedBlock(nn.Module):
    """Residual bottleneck: 1x1, dilated 3x3 and 1x1 convs, each with BN and ReLU, and the sum."""

    def __init__(self, channels: int, mid_channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(channels, mid_channels, 1)
        self.conv2 = _conv_norm_relu(mid_channels, mid_channels, 3, dilation)
        self.conv3 = _conv_norm_relu(mid_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        return x + self.conv3(self.conv2(self.conv1(x)))


class DilatedEncoder(nn.Module):
    """Projector (1x1, 3x3, no activation) followed by one residual block for each dilation.

    Source: arXiv 2103.09460, section 4 and figure 5.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        mid_channels: int = 128,
        dilations: Sequence[int] = (2, 4, 6, 8),
    ) -> None:
        super().__init__()
        self.lateral_conv = nn.Conv2d(in_channels, channels, 1)
        self.lateral_norm = nn.BatchNorm2d(channels)
        self.output_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.output_norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*[DilatedBlock(channels, mid_channels, d) for d in dilations])
        for conv in (self.lateral_conv, self.output_conv):
            # Caffe2's Xavier initialization: uniform with variance 1 / fan_in.
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H, W)."""
        x = self.lateral_norm(self.lateral_conv(x))
        x = self.output_norm(self.output_conv(x))
        return self.blocks(x)


def _conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
