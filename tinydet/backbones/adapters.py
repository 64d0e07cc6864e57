"""What fits a layer to the place of another: its channels' axis, several widths, a bound."""

from __future__ import annotations

from torch import Tensor, nn


class ChannelsAlong(nn.Module):
    """Runs a layer made for (B, C, H, W) along another axis of a tensor of any shape.

    Attributes:
        body: the layer.
        axis: which axis the layer takes as channels; there is at least one more before it.
    """

    def __init__(self, body: nn.Module, axis: int) -> None:
        super().__init__()
        self.body = body
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in the shape of `x`."""
        y = x.movedim(self.axis, 1)
        rows = y.shape[2] if y.ndim > 2 else 1
        return self.body(y.reshape(*y.shape[:2], rows, -1)).reshape(y.shape).movedim(1, self.axis)


class ByWidth(nn.Module):
    """One layer for each number of channels, for an activation that several places share.

    Attributes:
        bodies: the layers; the name of each is its number of channels.
        axis: of the channels.
    """

    def __init__(self, bodies: dict[int, nn.Module], axis: int) -> None:
        super().__init__()
        self.bodies = nn.ModuleDict({str(width): body for width, body in bodies.items()})
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer for this many channels."""
        return self.bodies[str(int(x.shape[self.axis]))](x)


class Capped(nn.Module):
    """An activation that returns no more than a bound, as ReLU6 does.

    Attributes:
        body: the activation.
        bound: the largest value it returns.
    """

    def __init__(self, body: nn.Module, bound: float) -> None:
        super().__init__()
        self.body = body
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation's output, larger values replaced by the bound."""
        return self.body(x).clamp(max=self.bound)
