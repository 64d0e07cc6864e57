"""ACON activations, which learn per channel whether to be linear or not (arXiv 2009.04759).

All are smooth maxima of two linear functions, eta_a = p1 x and eta_b = p2 x:

    f(x) = (p1 - p2) x * sigmoid(beta (p1 - p2) x) + p2 x

With beta -> inf it is max(p1 x, p2 x), with beta = 0 their mean; p1 = 1, p2 = 0 is Swish. The slope
is between about 1.0998 p2 - 0.0998 p1 and 1.0998 p1 - 0.0998 p2 (p1 >= p2) for any beta > 0.

The parameters have the shape (C,), not (1, C, 1, 1), so that optimizers that exempt one-dimensional
parameters from weight decay exempt these, which should not decay to zero.
"""

from __future__ import annotations

import timm.layers
import torch
from torch import Tensor, nn

# x sigmoid(beta x) differs from ReLU by at most 0.27846 / beta, for 25 by 0.0112, a hundredth of
# the unit scale of x after batch norm. Through the 32 activations of EfficientNet-Lite0 the last
# features change by 1 % of their norm (6 % with 10, 0.1 % with 100). A larger beta is closer to
# ReLU but learns more slowly: df/dbeta is at most 0.44 / beta^2.
RELU_BETA = 25.0

# The sigmoid approximation of GELU (arXiv 1606.08415, section 2), with an error of at most 0.0204.
GELU_BETA = 1.702

# MetaAcon's initial beta is sigmoid(3) = 0.953.
_META_BIAS = 3.0

# Saturates beta, but is within the range of float16.
_HIDDEN_LIMIT = 1e4

_RELU_LIKE = (nn.ReLU, nn.ReLU6)
_GELU_LIKE = (nn.GELU, timm.layers.GELU, timm.layers.GELUTanh, timm.layers.QuickGELU)


class AconA(nn.Module):
    """ACON-A, Swish with a learnable beta per channel: x * sigmoid(beta x). Starts as SiLU.

    Attributes:
        beta: (C,).
    """

    def __init__(self, channels: int) -> None:
        """Start as SiLU.

        Args:
            channels: C, size of dimension 1 of the input.

        Raises:
            ValueError: `channels` is not positive.
        """
        super().__init__()
        self.beta = _per_channel(channels, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation.

        Args:
            x: (B, C, *spatial), with any number of spatial dimensions.

        Returns:
            A tensor of the shape and dtype of `x`.

        Raises:
            ValueError: `x` has another number of channels.
        """
        beta = _along_channels(self.beta, x)
        wide = _wide(x, beta)
        return (wide * torch.sigmoid(beta * wide)).to(x.dtype)


class AconB(nn.Module):
    """ACON-B, the smooth form of PReLU: the smooth maximum of x and p x. Starts as SiLU.

    Attributes:
        p: (C,), the slope at far negative x (while p < 1 and beta > 0).
        beta: (C,).
    """

    def __init__(self, channels: int) -> None:
        """Start with p = 0 and beta = 1, SiLU.

        Args:
            channels: C, size of dimension 1 of the input.

        Raises:
            ValueError: `channels` is not positive.
        """
        super().__init__()
        self.p = _per_channel(channels, 0.0)
        self.beta = _per_channel(channels, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation, see `AconA.forward`."""
        return _smooth_maximum(x, 1.0, _along_channels(self.p, x), _along_channels(self.beta, x))


class AconC(nn.Module):
    """ACON-C: the smooth maximum of p1 x and p2 x, all three parameters learnable per channel.

    It starts as SiLU (p1 = 1, p2 = 0, beta = 1). The authors' code draws p1 and p2 from N(0, 1),
    which suits training from scratch but would destroy the features of a pretrained network.

    Attributes:
        p1: (C,), the slope at far positive x (while p1 > p2 and beta > 0).
        p2: (C,), the slope at far negative x.
        beta: (C,), sharpness of the transition between the two.
    """

    def __init__(self, channels: int) -> None:
        """Start as SiLU.

        Args:
            channels: C, size of dimension 1 of the input.

        Raises:
            ValueError: `channels` is not positive.
        """
        super().__init__()
        self.p1 = _per_channel(channels, 1.0)
        self.p2 = _per_channel(channels, 0.0)
        self.beta = _per_channel(channels, 1.0)

    @classmethod
    def like(cls, activation: nn.Module, channels: int) -> AconC:
        """Create an ACON-C that starts as close as possible to `activation`.

        Largest initial difference over all x: SiLU 0; ReLU 0.0112; GELU 0.0204; Hardswish 0.143, at
        x = 3 and -3; LeakyReLU (1 - negative_slope) times that of ReLU. ReLU6 is treated as ReLU,
        since ACON has no upper bound. Any other activation is replaced by SiLU.

        Args:
            activation: the activation to replace; only its class and negative slope are used.
            channels: C, size of dimension 1 of the input.

        Returns:
            The activation, in float32 on the CPU.

        Raises:
            ValueError: `channels` is not positive.
        """
        made = cls(channels)
        with torch.no_grad():
            if isinstance(activation, _RELU_LIKE):
                made.beta.fill_(RELU_BETA)
            elif isinstance(activation, _GELU_LIKE):
                made.beta.fill_(GELU_BETA)
            elif isinstance(activation, nn.LeakyReLU) and activation.negative_slope < 1:
                made.p2.fill_(activation.negative_slope)
                # beta is multiplied by (p1 - p2).
                made.beta.fill_(RELU_BETA / (1 - activation.negative_slope))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation, see `AconA.forward`."""
        p1, p2 = _along_channels(self.p1, x), _along_channels(self.p2, x)
        return _smooth_maximum(x, p1, p2, _along_channels(self.beta, x))


class MetaAcon(nn.Module):
    """Meta-ACON-C: ACON-C with a beta per sample and channel, computed by a small network.

    beta = sigmoid(W1 W2 mean(x) + b), with the mean over all positions: the paper's channel-wise
    G(x), with the mean instead of its sum, as in the authors' code, and with biases. W1 and W2 are
    linear layers with max(r, C / r) hidden units, equivalent to that code's 1x1 convs.

    The authors' code has a batch norm after each layer; here, as in the paper's equation, there is
    none. Each would see only B values per channel: it fails when training with one sample (the
    authors then advise removing both, github.com/nmaac/acon/issues/4), is noisy with the small
    batches of detection, and YOLOv5 removed both as unstable (its pull request 2901).

    The initial function is near SiLU and the same for every sample: p1 = 1, p2 = 0, zero weights in
    the last layer and b = 3, so beta = 0.953. It differs from SiLU by at most 0.022. A sigmoid
    cannot reach beta = 1, and a larger b is closer but passes less gradient (the sigmoid's slope is
    0.045 here, 0.018 at b = 4). Since beta < 1, Meta-ACON cannot start as ReLU.

    Attributes:
        p1: (C,).
        p2: (C,).
        squeeze: the first linear layer, C to max(r, C / r).
        excite: the second linear layer, back to C.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        """Start near SiLU.

        Args:
            channels: C, size of dimension 1 of the input.
            reduction: r of the paper, also the minimum number of hidden units.

        Raises:
            ValueError: `channels` or `reduction` is not positive.
        """
        super().__init__()
        if reduction < 1:
            raise ValueError(f"MetaAcon: reduction is {reduction}; give a positive number")
        self.p1 = _per_channel(channels, 1.0)
        self.p2 = _per_channel(channels, 0.0)
        hidden = max(reduction, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        nn.init.zeros_(self.excite.weight)
        nn.init.constant_(self.excite.bias, _META_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation, see `AconA.forward`."""
        p1, p2 = _along_channels(self.p1, x), _along_channels(self.p2, x)
        mean = x.mean(tuple(range(2, x.ndim))) if x.ndim > 2 else x  # (B, C)
        # An overflow in float16 could become NaN in `excite`, which may add inf and -inf.
        hidden = self.squeeze(mean).clamp(-_HIDDEN_LIMIT, _HIDDEN_LIMIT)
        beta = torch.sigmoid(self.excite(hidden))  # (B, C)
        return _smooth_maximum(x, p1, p2, _along_channels(beta, x))


def _smooth_maximum(x: Tensor, p1: Tensor | float, p2: Tensor, beta: Tensor) -> Tensor:
    """Return x times a slope between p2 and p1: the formula above with x factored out.

    This avoids NaN for large x: (p1 - p2) x can overflow in float16, and infinity times a sigmoid
    of 0 is NaN. Factored, only results that are themselves out of range overflow. Under autocast
    the parameters and the arithmetic are float32; the result has the dtype of x, so that the next
    layer needs no more memory.
    """
    difference = p1 - p2
    wide = _wide(x, difference)
    slope = torch.addcmul(p2, difference, torch.sigmoid(beta * difference * wide))
    return (wide * slope).to(x.dtype)


def _wide(x: Tensor, parameter: Tensor) -> Tensor:
    """Convert x to the common dtype once: products of mixed dtypes are slow on a CPU."""
    return x.to(torch.promote_types(x.dtype, parameter.dtype))


def _per_channel(channels: int, value: float) -> nn.Parameter:
    if channels < 1:
        raise ValueError(f"ACON: channels is {channels}; give the positive size of dimension 1")
    return nn.Parameter(torch.full((channels,), value))


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    """Reshape (C,) or (B, C) values to broadcast with x, (B, C, *spatial)."""
    # A single channel would silently broadcast to any number.
    if x.ndim < 2 or x.shape[1] != values.shape[-1]:
        raise ValueError(
            f"ACON: input of shape {tuple(x.shape)} for {values.shape[-1]} channels; "
            "give (B, channels, ...)"
        )
    return values.reshape(*values.shape, *(1,) * (x.ndim - 2))
