"""ACON activations, which learn per channel whether to be linear or not (arXiv 2009.04759).

All are the smooth maximum of two lines, eta_a = p1 x and eta_b = p2 x:

    f(x) = (p1 - p2) x * sigmoid(beta (p1 - p2) x) + p2 x

With beta -> inf it is max(p1 x, p2 x), with beta = 0 their mean; p1 = 1, p2 = 0 is Swish. Its slope
runs from about 1.0998 p2 - 0.0998 p1 to 1.0998 p1 - 0.0998 p2 (p1 >= p2), whatever beta > 0 is.

The parameters are vectors of C numbers, not (1, C, 1, 1): an optimiser that exempts parameters of
one dimension from weight decay then exempts these, for which zero is no natural resting point.
"""

from __future__ import annotations

import timm.layers
import torch
from torch import Tensor, nn

# x sigmoid(beta x) is within 0.27846 / beta of ReLU, so 25 is within 0.0112: a hundredth of the
# unit scale that batch norm gives to x. Through the 32 activations of EfficientNet-Lite0 the last
# features move by 1 % of their norm (6 % with 10, 0.1 % with 100). A larger beta is nearer, but
# learns ever more slowly: df/dbeta is at most 0.44 / beta^2.
RELU_BETA = 25.0

# The usual sigmoid form of GELU (arXiv 1606.08415, section 2), within 0.0204 of it.
GELU_BETA = 1.702

# MetaAcon's beta before training is sigmoid(3) = 0.953.
_META_BIAS = 3.0

# Far beyond what saturates beta, and within float16.
_HIDDEN_LIMIT = 1e4

_RELU_LIKE = (nn.ReLU, nn.ReLU6)
_GELU_LIKE = (nn.GELU, timm.layers.GELU, timm.layers.GELUTanh, timm.layers.QuickGELU)


class AconA(nn.Module):
    """ACON-A, Swish with one learnable beta a channel: x * sigmoid(beta x). Starts as SiLU.

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
        """Activate.

        Args:
            x: (B, C, *spatial), any number of spatial dimensions or none.

        Returns:
            Of the shape and type of `x`.

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
        """Activate; as for `AconA.forward`."""
        return _smooth_maximum(x, 1.0, _along_channels(self.p, x), _along_channels(self.beta, x))


class AconC(nn.Module):
    """ACON-C: the smooth maximum of p1 x and p2 x, all three parameters learnable per channel.

    It starts as SiLU (p1 = 1, p2 = 0, beta = 1). The authors' code draws p1 and p2 from N(0, 1):
    that is for training from scratch, and would make noise of a pretrained network's channels.

    Attributes:
        p1: (C,), the slope at far positive x (while p1 > p2 and beta > 0).
        p2: (C,), the slope at far negative x.
        beta: (C,), how sharply one goes over into the other.
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
        """Make an ACON-C that starts as near to `activation` as it can.

        Largest difference over all x, at the start: SiLU 0; ReLU 0.0112; GELU 0.0204; Hardswish
        0.143, at x = 3 and -3; LeakyReLU (1 - negative_slope) times that of ReLU. ReLU6 starts as
        ReLU, for ACON has no upper bound: the two part above 6. In place of any other activation
        the start is SiLU.

        Args:
            activation: what is being replaced; only its kind and its negative slope are read.
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
                # beta counts only times (p1 - p2).
                made.beta.fill_(RELU_BETA / (1 - activation.negative_slope))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Activate; as for `AconA.forward`."""
        p1, p2 = _along_channels(self.p1, x), _along_channels(self.p2, x)
        return _smooth_maximum(x, p1, p2, _along_channels(self.beta, x))


class MetaAcon(nn.Module):
    """Meta-ACON-C: ACON-C whose beta a small network reads off the sample, for each channel.

    beta = sigmoid(W1 W2 mean(x) + b), the mean over all places: the paper's channel-wise G(x), but
    with the mean for its sum, as the authors' code has it, and with biases. The two factors are
    linear layers with max(r, C / r) units between, as in that code; on a map of one pixel 1x1 convs
    are the same.

    The authors' code has a batch norm after either layer; here, as in the paper's equation, there
    is none. Each would see only B values a channel: it raises an error when training with one
    sample (the authors then advise removing both, github.com/nmaac/acon/issues/4), is noise with
    the few images a step of detection, and YOLOv5 dropped both as unstable (its pull request 2901).

    The start is near SiLU and the same for every sample: p1 = 1, p2 = 0, the last weights zero and
    b = 3, so beta = 0.953. That is within 0.022 of SiLU; beta = 1 itself is out of the sigmoid's
    reach, and a larger b is nearer to it but lets less gradient through (the sigmoid's slope is
    0.045 here, 0.018 at b = 4). As beta stays below 1, Meta-ACON cannot start as ReLU.

    Attributes:
        p1: (C,).
        p2: (C,).
        squeeze: the first linear layer, C to max(r, C / r).
        excite: the second, back to C.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        """Start near SiLU.

        Args:
            channels: C, size of dimension 1 of the input.
            reduction: r of the paper; at least this many hidden units remain.

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
        """Activate; as for `AconA.forward`."""
        p1, p2 = _along_channels(self.p1, x), _along_channels(self.p2, x)
        mean = x.mean(tuple(range(2, x.ndim))) if x.ndim > 2 else x  # (B, C)
        # An overflow in float16 would be NaN after `excite`, which may add inf and -inf.
        hidden = self.squeeze(mean).clamp(-_HIDDEN_LIMIT, _HIDDEN_LIMIT)
        beta = torch.sigmoid(self.excite(hidden))  # (B, C)
        return _smooth_maximum(x, p1, p2, _along_channels(beta, x))


def _smooth_maximum(x: Tensor, p1: Tensor | float, p2: Tensor, beta: Tensor) -> Tensor:
    """Return x times a slope between p2 and p1, which is the formula above with x taken out.

    Written so, a large x meets no infinity times zero: (p1 - p2) x alone can overflow in float16,
    and its product with a saturated sigmoid would be NaN. Here the result overflows only where it
    is itself out of range. Under autocast the parameters are float32 and so is the arithmetic;
    the result goes back to the type of x, to cost the next layer no more memory.
    """
    difference = p1 - p2
    wide = _wide(x, difference)
    slope = torch.addcmul(p2, difference, torch.sigmoid(beta * difference * wide))
    return (wide * slope).to(x.dtype)


def _wide(x: Tensor, parameter: Tensor) -> Tensor:
    """Convert x once: on a CPU a product of two types is slow, forward and backward."""
    return x.to(torch.promote_types(x.dtype, parameter.dtype))


def _per_channel(channels: int, value: float) -> nn.Parameter:
    if channels < 1:
        raise ValueError(f"ACON: channels is {channels}; give the positive size of dimension 1")
    return nn.Parameter(torch.full((channels,), value))


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    """Shape (C,) or (B, C) to broadcast with x, (B, C, *spatial)."""
    # One channel would broadcast with any number, so a mismatch would go unseen.
    if x.ndim < 2 or x.shape[1] != values.shape[-1]:
        raise ValueError(
            f"ACON: input of shape {tuple(x.shape)} for {values.shape[-1]} channels; "
            "give (B, channels, ...)"
        )
    return values.reshape(*values.shape, *(1,) * (x.ndim - 2))
