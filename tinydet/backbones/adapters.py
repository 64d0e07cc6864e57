"""Wrappers that fit a layer into a network: another channel axis, several widths, a bound."""

from __future__ import annotations

from torch import Tensor, nn


class ChannelsAlong(nn.Module):
    """Applies a layer for (B, C, H, W) to another channel axis of a tensor of any shape.

    Attributes:
        body: the layer.
        axis: the channel axis of the input, at least 1.
    """

    def __init__(self, body: nn.Module, axis: int) -> None:
        super().__init__()
        self.body = body
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, of the shape of `x`."""
        y = x.movedim(self.axis, 1)
        rows = y.shape[2] if y.ndim > 2 else 1
        return self.body(y.reshape(*y.shape[:2], rows, -1)).reshape(y.shape).movedim(1, self.axis)


class ByWidth(nn.Module):
    """One layer for each number of channels, for an activation module shared by several places.

    Attributes:
        bodies: the layers; each is named after its number of channels.
        axis: the channel axis of the input.
    """

    def __init__(self, bodies: dict[int, nn.Module], axis: int) -> None:
        super().__init__()
        self.bodies = nn.ModuleDict({str(width): body for width, body in bodies.items()})
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer for the input's number of channels."""
        return self.bodies[str(int(x.shape[self.axis]))](x)


class Capped(nn.Module):
    """An activation with an upper bound, as ReLU6 has.

    Attributes:
        body: the activation.
        bound: largest value of the output.
    """

    def __init__(self, body: nn.Module, bound: float) -> None:
        super().__init__()
        self.body = body
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation's output, clamped to the bound."""
        return self.body(x).clamp(max=self.bound)
