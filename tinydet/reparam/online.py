"""Branches inside a conv's weight: their kernels are added to it before the convolution.

The branches of a conv are linear, so that their outputs need not be computed and added: the sum of
their kernels is one kernel, and a training step runs one convolution. This is OREPA's online
re-parameterization (arXiv 2204.00826), here for any block. A norm inside a branch, which needs the
branch's output, becomes a learned scale of each channel.

The kernel of a branch of plain layers is composed from theirs. That of any other branch is read
off its response to impulses in every step, which is slower.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydet.reparam.branches import ChannelScale
from tinydet.reparam.verify import TOLERANCE

Pair = tuple[int, int]
_ONE: Pair = (1, 1)


class BranchKernels(nn.Module):
    """A parametrization of a conv's weight that adds the kernels of branches to it.

    Attributes:
        branches: each maps the conv's input linearly to the shape of its output.

    Args:
        conv: whose taps, stride, padding and groups the branches have.
        branches: the branches.
    """

    def __init__(self, conv: nn.Conv2d, branches: Iterable[nn.Sequential]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self._grid = _Grid.of(conv)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the (C_out, C_in / groups, h, w) weight plus the kernels of the branches."""
        # Not autocast: the sum of rounded kernels would not be that of the branches.
        device = weight.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            parts = [
                _composed(cast(nn.Sequential, branch), self._grid) or _measured(branch, self._grid)
                for branch in self.branches
            ]
            kernels = [part.kernel for part in parts]
            return _Sum.apply(weight, [part.window for part in parts], *kernels)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight to which the kernels add up to this one."""
        return weight - self(torch.zeros_like(weight))


def make_linear(branch: nn.Sequential) -> None:
    """Put scales in place of a branch's batch norms and remove its biases, in place."""
    for name, module in list(branch.named_modules()):
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            branch.set_submodule(name, ChannelScale(cast(nn.BatchNorm2d, module).num_features))
        elif isinstance(module, nn.Conv2d):
            module.register_parameter("bias", None)


def check_kernel(branch: nn.Sequential, conv: nn.Conv2d, where: str) -> None:
    """Compare a branch, with random scales, with its kernel.

    Raises:
        ValueError: it is not linear, or reaches beyond the conv's taps or groups.
    """
    if conv.weight.is_meta:
        return
    exact, grid = copy.deepcopy(branch).cpu().double().train(), _Grid.of(conv)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for module in exact.modules():
            if isinstance(module, ChannelScale):
                nn.init.normal_(module.weight, 1.0)
        kernel = BranchKernels(conv, [exact])(torch.zeros(conv.weight.shape, dtype=torch.float64))
        sides = [d * (k - 1) + 1 + 3 * s for k, s, _, d in grid.axes()]
        for more in range(max(2, *grid.stride)):
            x = torch.randn(1, grid.channels, *(side + more for side in sides)).double()
            padded = F.pad(x, (grid.padding[1],) * 2 + (grid.padding[0],) * 2)
            expected = F.conv2d(padded, kernel, None, grid.stride, 0, grid.dilation, grid.groups)
            found = exact(x)
            same = found.shape == expected.shape
            if not same or not (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
                raise ValueError(
                    f"{where} is not a kernel on the conv's taps: it is not linear, works in "
                    "another way in training, or reaches further; use online=False"
                )


@dataclass(frozen=True)
class _Grid:
    """The taps of a conv: tap t of output o reads input o * stride - padding + t * dilation."""

    channels: int
    groups: int
    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def of(cls, conv: nn.Conv2d) -> _Grid:
        left, _, top, _ = conv._reversed_padding_repeated_twice
        shape = cast(tuple[Pair, Pair, Pair], (conv.kernel_size, conv.stride, conv.dilation))
        return cls(conv.in_channels, conv.groups, *shape[:2], (top, left), shape[2])

    def axes(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield taps, stride, padding and dilation along each axis."""
        return zip(self.size, self.stride, self.padding, self.dilation, strict=True)


@dataclass(frozen=True)
class _Part:
    """A kernel on some of a conv's taps.

    Attributes:
        kernel: (C_out, C_in / groups, h, w), where a side of 1 may stand for several equal taps.
        window: the taps' rows and columns.
    """

    kernel: Tensor
    window: tuple[slice, slice]


class _Sum(torch.autograd.Function):
    """Adds kernels to windows of a weight. The generic operations copy the weight for each."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, windows: list[tuple[slice, slice]], *kernels: Tensor
    ) -> Tensor:
        """Return the sum."""
        ctx.windows = windows
        ctx.sides = [kernel.shape[2:] for kernel in kernels]
        total = weight.clone()
        for kernel, (rows, columns) in zip(kernels, windows, strict=True):
            total[:, :, rows, columns] += kernel
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient's windows, summed over equal taps."""
        seen = [grad[:, :, rows, columns] for rows, columns in ctx.windows]
        sizes = [(*part.shape[:2], *sides) for part, sides in zip(seen, ctx.sides, strict=True)]
        return grad, None, *(p.sum_to_size(size) for p, size in zip(seen, sizes, strict=True))


@dataclass(frozen=True)
class _Window:
    """The taps of a layer that convolves, averages or pads."""

    size: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)

    @classmethod
    def of(cls, layer: Any) -> tuple[_Window, Pair] | None:
        """Return a layer's taps and its zeros before the first row and column; None if unknown."""
        if type(layer) is nn.ZeroPad2d:
            left, _, top, _ = layer.padding
            return cls(), (top, left)
        size, stride, padding = map(_pair, (layer.kernel_size, layer.stride, layer.padding))
        if type(layer) is nn.AvgPool2d:
            return None if layer.divisor_override else (cls(size, stride), padding)
        known = not isinstance(layer.padding, str)
        return (cls(size, stride, _pair(layer.dilation)), padding) if known else None

    def on(self, grid: _Grid, before: Pair) -> tuple[slice, slice] | None:
        """Return these taps as rows and columns of a conv's, None if they are no such."""
        slices = []
        own = zip(self.size, self.dilation, before, strict=True)
        for (size, spacing, pad), (taps, _, padding, dilation) in zip(
            own, grid.axes(), strict=True
        ):
            first, off = divmod(padding - pad, dilation)
            step, uneven = divmod(spacing, dilation) if size > 1 else (1, 0)
            end = first + step * (size - 1) + 1
            if off or uneven or not 0 <= first < end <= taps:
                return None
            slices.append(slice(first, end, step))
        return slices[0], slices[1]


def _composed(branch: nn.Sequential, grid: _Grid) -> _Part | None:
    """Return the kernel of a branch of plain layers, None if there is no rule for it.

    What makes a branch no convolution on the conv's taps, such as a stride of its own or another
    border, `check_kernel` has refused.
    """
    factors: list[tuple[Tensor, int]] = []  # weights and their groups, in the order of the layers
    window, before, mean = _Window(), (0, 0), 1.0
    for layer in _layers(branch):
        if type(layer) in (nn.Conv2d, ChannelScale) and "weight" not in layer._parameters:
            return None  # A hook computes it, as in pruning.
        if type(layer) is ChannelScale:
            # Into the weight before it: the product of two weights is often larger.
            weight, groups = factors.pop() if factors else (None, grid.groups)
            factors.append((_scaled(weight, layer.weight * mean, groups), groups))
            mean = 1.0
        elif type(layer) in (nn.Conv2d, nn.AvgPool2d, nn.ZeroPad2d):
            found = _Window.of(layer)
            if found is None:
                return None
            own, pads = found
            if window != _Window() and (own != _Window() or pads != (0, 0)):
                return None  # two layers with taps, or zeros around an output
            window = own if window == _Window() else window
            before = (before[0] + pads[0], before[1] + pads[1])
            if type(layer) is nn.AvgPool2d:
                mean /= own.size[0] * own.size[1]
            elif type(layer) is nn.Conv2d:
                factors.append((layer.weight, layer.groups))
        elif type(layer) is not nn.Identity:
            return None
    kernel, groups = factors[0]
    for then, then_groups in factors[1:]:
        product = _product(kernel, groups, then, then_groups)
        if product is None:
            return None
        kernel, groups = product
    place = window.on(grid, before)
    return None if place is None or groups != grid.groups else _Part(kernel, place)


def _layers(branch: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a sequence, also of sequences in it."""
    if type(branch) is not nn.Sequential:
        yield branch
    else:
        for part in branch:
            yield from _layers(part)


def _product(
    first: Tensor, groups: int, then: Tensor, then_groups: int
) -> tuple[Tensor, int] | None:
    """Return the kernel and groups of two convs in series, one of which has a single tap.

    None if their groups do not fit together.
    """
    if then_groups == len(first) == len(then):
        return first * then, groups
    if then_groups != groups:
        return None
    if groups == 1 and first.shape[2:] == _ONE:
        return F.conv2d(then, first.transpose(0, 1)), groups
    # (g, outputs, inputs of the second, taps) and (g, outputs, inputs of the first, taps)
    last, before = (w.unflatten(0, (groups, -1)).flatten(3) for w in (then, first))
    product = torch.einsum("gomt,gmit->goit", last, before)  # One of them has a single tap.
    taps = then.shape[2:] if first.shape[2:] == _ONE else first.shape[2:]
    return product.flatten(0, 1).unflatten(2, taps), groups


def _scaled(weight: Tensor | None, scale: Tensor, groups: int) -> Tensor:
    """Return a weight times a factor of each output channel; without one that of the identity."""
    if weight is not None:
        return weight * scale.view(-1, 1, 1, 1)
    return torch.diag_embed(scale.view(groups, -1)).flatten(0, 1)[..., None, None]


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else value


def _measured(branch: nn.Module, grid: _Grid) -> _Part:
    """Return the kernel of any linear branch: its responses to impulses."""
    (ys, phase_y, out_y, height), (xs, phase_x, out_x, width) = (
        _impulses(*axis) for axis in grid.axes()
    )
    inputs = grid.channels // grid.groups
    like = next(branch.parameters())
    x = like.new_zeros(len(ys), len(xs), inputs, grid.groups, inputs, height, width)
    each = range(inputs)
    for (i, top), (j, left) in itertools.product(enumerate(ys), enumerate(xs)):
        x[i, j, each, :, each, top, left] = 1  # the same input channel of every group
    y = branch(x.flatten(3, 4).flatten(0, 2)).unflatten(0, x.shape[:3])
    # (taps, taps, inputs, C_out)
    found = y.movedim(3, -1)[phase_y[:, None], phase_x, :, out_y[:, None], out_x]
    return _Part(found.permute(3, 2, 0, 1), (slice(None), slice(None)))


def _impulses(
    taps: int, stride: int, padding: int, dilation: int
) -> tuple[list[int], Tensor, Tensor, int]:
    """Return where to put impulses along an axis, so that each tap of a conv sees one.

    Returns:
        The position of the impulse in each of several inputs, which input shows each tap, at which
        output, and the inputs' length.
    """
    reach = dilation * (taps - 1)
    start = max(0, reach - padding)
    firsts = [start + (dilation * t - padding - start) % stride for t in range(taps)]
    positions = sorted(set(firsts))
    outputs = [(p + padding - dilation * t) // stride for t, p in enumerate(firsts)]
    phases = [positions.index(p) for p in firsts]
    return positions, torch.tensor(phases), torch.tensor(outputs), positions[-1] + reach + 1
