"""Kinds of training-time branches that `expand` can add to a conv, and their geometry.

A kind is a callable from the conv to a list of modules, each mapping the conv's input to the shape
of its output. `tinydet.reparam.expand` appends a norm to each that starts at zero; a branch that
ends in a `ChannelScale` gets none, and its scale starts at zero. Here every branch

- is affine in eval mode, so that conv and branches together are equivalent to one conv;
- pads before anything else: a zero-padded layer after a shift would not be a convolution. The
  original DBB pads with the shift itself instead, which is the same function in eval mode;
- has its taps within the conv's taps, so that the merged conv has the shape of the original.

A custom kind builds the layers itself, or with the helpers `taps` and `centre`:

    class TwoMore:
        def __call__(self, conv: nn.Conv2d) -> list[nn.Module]:
            return [taps(conv, conv.kernel_size) for _ in range(2)]  # [] if not applicable
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Block = Callable[[nn.Conv2d], Sequence[nn.Module]]
Pads = tuple[int, int, int, int]

# Kernel side -> (taps a side, spacing) of each parallel conv: the choices of UniRepLKNet (arXiv
# 2311.15599). Other sizes use the largest smaller entry.
_LARGE_KERNEL = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class ChannelScale(nn.Module):
    """Multiplies each channel of an (N, C, H, W) tensor by a learned factor, 1 at the start.

    Attributes:
        weight: (C,) factors.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled tensor."""
        return x * self.weight.view(-1, 1, 1)


def repvgg(conv: nn.Conv2d) -> list[nn.Module]:
    """RepVGG (arXiv 2101.03697): a 1x1 conv, and the identity where the shape allows."""
    return [centre(conv), *_identity(conv)]


def qarepvgg(conv: nn.Conv2d) -> list[nn.Module]:
    """QARepVGG (arXiv 2212.01593): RepVGG's branches without norms of their own.

    The norm after the sum is the one that follows the conv. A norm of the identity branch divides
    by the spread of each input channel, which is nearly zero for channels that are rarely active.
    """
    return [nn.Sequential(branch, ChannelScale(conv.out_channels)) for branch in repvgg(conv)]


def acnet(conv: nn.Conv2d) -> list[nn.Module]:
    """ACNet (arXiv 1908.03930): the middle column and the middle row of the kernel."""
    height, width = _pair(conv.kernel_size)
    if height == 1 or width == 1:
        return []
    return [taps(conv, (height, 1)), taps(conv, (1, width))]


def dbb(conv: nn.Conv2d) -> list[nn.Module]:
    """Diverse Branch Block (arXiv 2103.13425): 1x1, 1x1 then kxk, 1x1 then average.

    As in the authors' code, a depthwise conv gets twice the channels between 1x1 and kxk, and no
    1x1 before the average. A 1x1 conv only gets a 1x1; a dilated conv gets no average, as pooling
    has no dilation.
    """
    if conv.kernel_size == (1, 1):
        return [centre(conv)]
    c_in, c_out, groups = conv.in_channels, conv.out_channels, conv.groups
    depthwise = groups == c_in > 1
    kernel, stride = _pair(conv.kernel_size), _pair(conv.stride)
    pads = _pads(conv, kernel)
    middle = 2 * c_in if depthwise else c_in
    kxk = nn.Conv2d(middle, c_out, kernel, stride, 0, _pair(conv.dilation), groups, bias=False)
    branches: list[nn.Module] = [
        centre(conv),
        nn.Sequential(*_conv(pads, c_in, middle, groups=groups), nn.BatchNorm2d(middle), kxk),
    ]
    if all(d == 1 or k == 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        before: list[nn.Module]
        if depthwise and c_in == c_out:
            before = [nn.ZeroPad2d(pads)] if any(pads) else []
        else:
            before = [*_conv(pads, c_in, c_out, groups=groups), nn.BatchNorm2d(c_out)]
        branches.append(nn.Sequential(*before, nn.AvgPool2d(kernel, stride)))
    return branches


def orepa(conv: nn.Conv2d) -> list[nn.Module]:
    """OREPA (arXiv 2204.00826): DBB's branches, and 1x1 then a fixed frequency filter.

    The filters are the cosines along one axis of the kernel that are not constant, along its height
    for the first half of the channels and along its width for the others. A depthwise conv gets no
    1x1 before them.
    """
    branches = dbb(conv)
    if conv.kernel_size == (1, 1):
        return branches
    c_in, c_out, groups = conv.in_channels, conv.out_channels, conv.groups
    kernel, pads = _pair(conv.kernel_size), _pads(conv, _pair(conv.kernel_size))
    filters = nn.Conv2d(
        c_out, c_out, kernel, _pair(conv.stride), 0, _pair(conv.dilation), c_out, bias=False
    )
    filters.weight.requires_grad_(False).copy_(_cosines(c_out, kernel))
    if groups == c_in == c_out > 1:
        before: list[nn.Module] = [nn.ZeroPad2d(pads)] if any(pads) else []
    else:
        before = [*_conv(pads, c_in, c_out, groups=groups), nn.BatchNorm2d(c_out)]
    return [*branches, nn.Sequential(*before, filters)]


def _cosines(channels: int, size: tuple[int, int]) -> Tensor:
    """Return (C, 1, h, w) filters: a cosine of 1, 2, ... half periods along one axis."""
    filters = torch.ones(channels, 1, *size)
    for channel in range(channels):
        first = channel < channels // 2
        axis = 0 if (first and size[0] > 1) or size[1] == 1 else 1
        taps = size[axis]
        index = channel if first else channel - channels // 2
        phase = torch.pi * (torch.arange(taps) + 0.5) * (1 + index % (taps - 1)) / taps
        filters[channel, 0] *= phase.cos().view(-1, 1) if axis == 0 else phase.cos()
    return filters


def mobileone(conv: nn.Conv2d, copies: int = 4) -> list[nn.Module]:
    """MobileOne (arXiv 2206.04040): copies of the conv, a 1x1, and the identity where possible.

    Args:
        conv: the conv.
        copies: over-parameterization factor; use `functools.partial` to change it.
    """
    branches: list[nn.Module] = [taps(conv, _pair(conv.kernel_size)) for _ in range(copies)]
    if conv.kernel_size != (1, 1):
        branches.append(centre(conv))
    return [*branches, *_identity(conv)]


def large_kernel(conv: nn.Conv2d) -> list[nn.Module]:
    """RepLKNet's smaller kernels (arXiv 2203.06717), dilated as UniRepLKNet's (arXiv 2311.15599).

    A kernel that is not square uses the entry of its shorter side above 1. Kernels of 2 to 4 only
    get a 1x1, and a 1x1 conv gets no branch.
    """
    height, width = conv.kernel_size
    side = min((k for k in (height, width) if k > 1), default=1)
    entry = max((k for k in _LARGE_KERNEL if k <= side), default=None)
    if entry is None:
        return [centre(conv)] if side > 1 else []
    return [taps(conv, (min(n, height), min(n, width)), (r, r)) for n, r in _LARGE_KERNEL[entry]]


BLOCKS: dict[str, Block] = {
    "repvgg": repvgg,
    "qarepvgg": qarepvgg,
    "acnet": acnet,
    "dbb": dbb,
    "orepa": orepa,
    "mobileone": mobileone,
    "large-kernel": large_kernel,
}


def taps(
    conv: nn.Conv2d, size: tuple[int, int], spacing: tuple[int, int] = (1, 1)
) -> nn.Sequential:
    """Return a new conv, without bias, on the middle taps of another one.

    Args:
        conv: its channels, stride and groups are used. `expand` gives a conv that may pad more at
            the end than at the start (timm's Conv2dSame, `padding="same"` with an even kernel) with
            `padding` 0, and its branches get the padded input.
        size: taps (height, width).
        spacing: distance of neighboring taps, in taps of the conv.
    """
    dilation = _pair(r * d for r, d in zip(spacing, conv.dilation, strict=True))
    pads = _pads(conv, size, spacing)
    c_in, c_out, groups = conv.in_channels, conv.out_channels, conv.groups
    return nn.Sequential(*_conv(pads, c_in, c_out, size, _pair(conv.stride), dilation, groups))


def centre(conv: nn.Conv2d) -> nn.Sequential:
    """Return a new 1x1 conv, without bias, on the middle tap of another one."""
    return taps(conv, (1, 1))


def _identity(conv: nn.Conv2d) -> list[nn.Module]:
    if conv.in_channels != conv.out_channels or max(conv.stride) > 1:
        return []
    pads = _pads(conv, (1, 1))
    return [nn.ZeroPad2d(pads) if any(pads) else nn.Identity()]


def _pads(conv: nn.Conv2d, size: tuple[int, int], spacing: tuple[int, int] = (1, 1)) -> Pads:
    """Return the padding (left, right, top, bottom) that centers `size` taps in the conv's kernel.

    Negative where the taps begin inside the input, which is then cropped.
    """

    def along(axis: int) -> tuple[int, int]:
        kernel, dilation = conv.kernel_size[axis], conv.dilation[axis]
        unused = kernel - 1 - spacing[axis] * (size[axis] - 1)
        before = unused // 2
        own_before, own_after = _own_padding(conv, axis)
        return own_before - before * dilation, own_after - (unused - before) * dilation

    return *along(1), *along(0)


def _own_padding(conv: nn.Conv2d, axis: int) -> tuple[int, int]:
    if isinstance(conv.padding, str):  # "valid" or "same"; torch puts the odd one at the end.
        if conv.padding == "valid":
            return 0, 0
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    padding = _pair(conv.padding)[axis]
    return padding, padding


def _pair(values: Iterable[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _conv(
    pads: Pads,
    c_in: int,
    c_out: int,
    size: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> list[nn.Module]:
    """Return the layers of a conv without bias that pads or crops its input."""
    left, right, top, bottom = pads
    symmetric = left == right >= 0 and top == bottom >= 0
    padding = (top, left) if symmetric else (0, 0)
    conv = nn.Conv2d(c_in, c_out, size, stride, padding, dilation, groups, bias=False)
    return [conv] if symmetric else [nn.ZeroPad2d(pads), conv]
