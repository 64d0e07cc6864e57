"""Re-parameterizable blocks written from their papers, under names that tell nothing.

No tool can know these classes or members, so only the data flow says what they compute. Where a
block ends in an activation, that activation is its member `z`: without it the block is one
convolution, which `equivalent_conv` finds by differentiation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv_norm(c_in, c_out, kernel, **kwargs):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, bias=False, **kwargs), nn.BatchNorm2d(c_out)
    )


class Amber(nn.Module):
    """RepVGG (arXiv 2101.03697): 3x3 + 1x1 + identity, each with a norm; the activation inside."""

    def __init__(self, c_in: int = 8, c_out: int = 8, stride: int = 1, groups: int = 1):
        super().__init__()
        self.a = nn.Conv2d(c_in, c_out, 3, stride, 1, groups=groups, bias=False)
        self.b = nn.BatchNorm2d(c_out)
        self.c = nn.Conv2d(c_in, c_out, 1, stride, groups=groups, bias=False)
        self.d = nn.BatchNorm2d(c_out)
        self.e = nn.BatchNorm2d(c_out) if c_in == c_out and stride == 1 else None
        self.z = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x)) + self.d(self.c(x))
        if self.e is not None:
            y = y + self.e(x)
        return self.z(y)


class Basalt(nn.Module):
    """MobileOne (arXiv 2206.04040): k copies of kxk, a 1x1 and a skip; sums made in place."""

    def __init__(
        self,
        c_in: int = 8,
        c_out: int = 8,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        copies: int = 3,
    ):
        super().__init__()
        shape = {"stride": stride, "groups": groups}
        pad = dilation * (kernel // 2)
        self.q = nn.ModuleList(
            _conv_norm(c_in, c_out, kernel, padding=pad, dilation=dilation, **shape)
            for _ in range(copies)
        )
        self.r = _conv_norm(c_in, c_out, 1, **shape) if kernel > 1 else None
        self.s = nn.BatchNorm2d(c_in) if c_in == c_out and stride == 1 else None
        self.z = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = 0 if self.r is None else self.r(x)
        for branch in self.q:
            y += branch(x)
        if self.s is not None:
            y += self.s(x)
        return self.z(y)


class Cobalt(nn.Module):
    """ACNet (arXiv 1908.03930): 3x3 + 1x3 + 3x1, each with a norm."""

    def __init__(self, channels: int = 8, stride: int = 1):
        super().__init__()
        self.third = _conv_norm(channels, channels, (1, 3), stride=stride, padding=(0, 1))
        self.first = _conv_norm(channels, channels, 3, stride=stride, padding=1)
        self.second = _conv_norm(channels, channels, (3, 1), stride=stride, padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + (self.second(x) + self.third(x))


class Dolomite(nn.Module):
    """Diverse Branch Block (arXiv 2103.13425), the input padded first.

    Branches: kxk; 1x1; 1x1 then kxk; 1x1 then average pooling. A norm follows each step.
    """

    def __init__(self, channels: int = 8, groups: int = 1):
        super().__init__()
        self.g = _conv_norm(channels, channels, 3, groups=groups)
        self.h = _conv_norm(channels, channels, 1, groups=groups)
        self.i = _conv_norm(channels, channels, 1, groups=groups)
        self.j = _conv_norm(channels, channels, 3, groups=groups)
        self.k = _conv_norm(channels, channels, 1, groups=groups)
        self.l = nn.Sequential(nn.AvgPool2d(3, stride=1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = F.pad(x, (1, 1, 1, 1))
        y = self.g(wide) + self.h(x) + self.j(self.i(wide))
        return y + self.l(self.k(wide))


class Dunite(Dolomite):
    """The same function as the paper builds it: 1x1 first, then a border of its value at zero."""

    def _bordered(self, layer: nn.Sequential, x: Tensor) -> Tensor:
        norm = layer[1]
        at_zero = norm.bias - norm.running_mean * norm.weight * torch.rsqrt(
            norm.running_var + norm.eps
        )
        y = F.pad(layer(x), (1, 1, 1, 1))
        border = at_zero.view(1, -1, 1, 1)
        y[:, :, :1], y[:, :, -1:] = border, border
        y[:, :, :, :1], y[:, :, :, -1:] = border, border
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.g(F.pad(x, (1, 1, 1, 1))) + self.h(x)
        y = y + self.j(self._bordered(self.i, x))
        return y + self.l(self._bordered(self.k, x))


class Diorite(Dolomite):
    """The same function once more: what is padded with zeros is the output less its value at 0."""

    def _bordered(self, layer: nn.Sequential, x: Tensor) -> Tensor:
        at_zero = layer(torch.zeros_like(x[:1, :, :1, :1]))
        return F.pad(layer(x) - at_zero, (1, 1, 1, 1)) + at_zero

    def forward(self, x: Tensor) -> Tensor:
        y = self.g(F.pad(x, (1, 1, 1, 1))) + self.h(x)
        y = y + self.j(self._bordered(self.i, x))
        return y + self.l(self._bordered(self.k, x))


class Emerald(nn.Module):
    """UniRepLKNet's dilated re-param block (arXiv 2311.15599): depthwise, 13x13 + dilated ones."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.o = nn.ModuleDict()
        for kernel, dilation in ((13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)):
            pad = dilation * (kernel // 2)
            self.o[f"t{kernel}{dilation}"] = _conv_norm(
                channels, channels, kernel, padding=pad, dilation=dilation, groups=channels
            )

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.o.values())


class Flint(nn.Module):
    """RepLKNet (arXiv 2203.06717): 31x31 and 5x5 depthwise, each with a norm."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.p = _conv_norm(channels, channels, 31, padding=15, groups=channels)
        self.s = _conv_norm(channels, channels, 5, padding=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(x) + self.s(x)


class Garnet(nn.Module):
    """FastViT's RepMixer (arXiv 2303.14189): x + scale * (mixer(x) - norm(x))."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.u = nn.BatchNorm2d(channels)
        self.v = Basalt(channels, channels, groups=channels, copies=1)
        self.v.z = nn.Identity()
        self.w = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w * (self.v(x) - self.u(x))


class Halite(nn.Module):
    """A residual branch of convolutions that ends in LayerScale (arXiv 2103.17239)."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.f = _conv_norm(channels, 2 * channels, 1)
        self.g = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.h = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(F.gelu(self.f(x))).mul(self.h)


class Iolite(nn.Module):
    """A residual branch of linear layers on (N, L, C) that ends in LayerScale."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.f = nn.Linear(channels, 2 * channels)
        self.g = nn.Linear(2 * channels, channels, bias=False)
        self.h = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.h * self.g(F.gelu(self.f(x)))


class Jade(nn.Module):
    """GhostNetV3's module (arXiv 2404.11202): branches in both the primary and the cheap step."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.alpha = Basalt(channels, channels, kernel=1, copies=3)
        self.beta = Basalt(channels, channels, groups=channels, copies=3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.alpha(x)
        return torch.cat([y, self.beta(y)], dim=1)


class Kyanite(nn.Module):
    """Parallel linear layers and the identity on (N, C), with norms on each and on the sum."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.a, self.b = nn.Linear(channels, channels), nn.Linear(channels, channels, bias=False)
        self.m, self.n, self.o, self.p = (nn.BatchNorm1d(channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.p(self.m(self.a(x)) + self.n(self.b(x)) + self.o(x))


class Lapis(nn.Module):
    """One linear block used in two places, on different inputs."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.y = Amber(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.y(self.y(x).neg())


class Marble(nn.Module):
    """Merged branches whose sum has two consumers."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.a, self.b = (_conv_norm(channels, channels, k, padding=k // 2) for k in (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return F.relu(y) * torch.sigmoid(y.mean((2, 3), keepdim=True))


def equivalent_conv(
    block: nn.Module, channels: int, reach: int, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the dense kernel and bias of a linear, shift-invariant float64 block.

    An output pixel's gradient with respect to the input is the kernel; its value at zero the bias.

    Args:
        block: the block, in eval mode, with its activation taken out.
        channels: its number of input channels.
        reach: how far its kernel reaches from the middle, in pixels: the kernel has 2 * reach + 1.
        stride: its stride.
    """
    size = 4 * reach + 2 * stride + 1
    x = torch.zeros(1, channels, size, size, dtype=torch.float64, requires_grad=True)
    y = block(x + 0)
    row = (size // 2) // stride  # an output pixel whose window lies inside the input
    start = row * stride - reach
    window = slice(start, start + 2 * reach + 1)
    kernels = [
        torch.autograd.grad(y[0, o, row, row], x, retain_graph=True)[0][0, :, window, window]
        for o in range(y.shape[1])
    ]
    return torch.stack(kernels), y[0, :, row, row].detach()


def dense_kernel(conv: nn.Conv2d) -> Tensor:
    """Return a grouped convolution's weight as that of the dense one."""
    per_group_out = conv.out_channels // conv.groups
    per_group_in = conv.in_channels // conv.groups
    dense = conv.weight.new_zeros(conv.out_channels, conv.in_channels, *conv.kernel_size)
    for o in range(conv.out_channels):
        first = (o // per_group_out) * per_group_in
        dense[o, first : first + per_group_in] = conv.weight[o].detach()
    return dense


def assert_same(
    expected: Tensor | list | tuple, found: Tensor | list | tuple, tolerance: float = 1e-9
) -> None:
    """Check two outputs to a fraction of their largest value.

    In float64 the default is far above rounding, and far below any other difference.
    """
    if isinstance(expected, Tensor):
        expected, found = [expected], [found]
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        bound = tolerance * max(a.abs().max().item(), 1e-3) if a.numel() else 0.0
        torch.testing.assert_close(b, a, rtol=0, atol=bound)
