"""The convolution or linear layer that is equivalent to an affine module.

A function that is affine and shift-invariant is a convolution whose kernel is the function's
impulse response. It does not matter how the module computes it: parallel branches of any kernel
size, dilation and number of groups, identities, norms, pools, constant factors, layers in series.
The bias is the response to zeros, the kernel the response to unit impulses. This is slow but needs
no rule for any operation; `linear_map.py` has rules for the usual ones.

However it was found, the layer is compared with the module on random inputs of several sizes,
including tiny ones, where borders matter most.

The taps of the kernel are determined with random weights, so the shape of the layer depends on
the structure only: two trained networks of one structure fold alike.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tinydet.reparam.dataflow import storage_of
from tinydet.reparam.geometry import Geometry, NotAConvolutionError, as_geometry
from tinydet.reparam.verify import TOLERANCE, difference

# Far above the rounding of sums of some thousand terms in float64, far below a wrong tap.
NO_TAP = 1e-12
# Float64 convolutions unfold their whole batch: these bounds keep that to some hundred MiB.
_CHUNK = 2**24  # most numbers in an unfolded batch of impulses
_LARGEST = 2**23  # most numbers in one probing input
_PROBES = 2**26  # most numbers in all probing inputs that find the taps
_WORK = 2**26  # most multiply-adds of an input that is compared in addition to the small ones


def find_geometry(
    module: nn.Module,
    in_channels: int,
    axes: int,
    groups: Sequence[int],
    reach: int,
    stride: int,
    most: float = math.inf,
) -> Geometry:
    """Find the shape of the convolution that a module computes, for any values of its weights.

    Args:
        module: takes one tensor (B, C, *spatial), or (B, C) where `axes` is 0; float64, on the
            CPU, in eval mode.
        in_channels: C.
        axes: number of spatial axes.
        groups: numbers of groups to try, the highest first.
        reach: upper bound of the distance of a tap from its output, in input steps.
        stride: a multiple of the input steps per output step.
        most: the multiply-adds that an output position may cost.

    Raises:
        NotAConvolutionError: it is no convolution, none that torch's layers can describe, one that
            costs more than `most`, or too large to be probed.
    """
    generic = randomised(copy.deepcopy(module))
    # A random mixture of all channels is enough to see every tap and to test shift invariance.
    mixtures_of_channels = mixtures(in_channels, max(groups))
    mixed = _Mixed(generic, mixtures_of_channels[0])
    if axes == 0:
        zero = _response_to_zeros(mixed, (1, 1))
        shape = Geometry(1, zero.shape[1], bool(zero.abs().max() > 0))
    else:
        _refuse_large(in_channels, axes, reach, stride)
        shape = _spatial_shape(mixed, axes, reach, stride)
    cheapest = replace(shape, in_channels=in_channels, groups=max(groups))
    if cheapest.multiply_adds(1) > most:
        # Checked first: the kernel may be huge.
        raise NotAConvolutionError(f"as {cheapest} it costs more")
    equivalent_layer(mixed, shape)
    if max(groups) == 1:
        return replace(shape, in_channels=in_channels)
    with torch.no_grad():
        responses, _ = _impulse_response(generic, shape, mixtures_of_channels)
    count = next((g for g in groups if keeps_groups_apart(responses, max(groups), g)), 1)
    return replace(shape, in_channels=in_channels, groups=count)


class _Mixed(nn.Module):
    """A module of one input channel that is spread over the module's channels by fixed factors."""

    mixture: Tensor

    def __init__(self, module: nn.Module, mixture: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mixture", mixture)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x * self.mixture.view(1, -1, *[1] * (x.ndim - 2)))


@torch.no_grad()
def equivalent_layer(module: nn.Module, geometry: Geometry) -> nn.Module:
    """Return the layer that is equivalent to a module, after comparing the two.

    Args:
        module: as in `find_geometry`.
        geometry: the result of `find_geometry`.

    Raises:
        NotAConvolutionError: the two differ.
    """
    columns = geometry.in_channels // geometry.groups
    # One input channel of each group at once: no output sees two of them.
    rows = torch.eye(columns, dtype=torch.float64).repeat(1, geometry.groups)  # (columns, C_in)
    response, zero = _impulse_response(module, geometry, rows)
    return checked_layer(module, geometry, response.transpose(0, 1), zero)


@torch.no_grad()
def checked_layer(module: nn.Module, geometry: Geometry, weight: Tensor, bias: Tensor) -> nn.Module:
    """Return a layer of given weights after comparing it with a module.

    Args:
        module: as in `find_geometry`.
        geometry: the shape of the layer.
        weight: (C_out, C_in / groups, *kernel).
        bias: (C_out,), unused if the geometry has none.

    Raises:
        NotAConvolutionError: the two differ.
    """
    layer = geometry.build()
    shared = storage_of(weight) in map(storage_of, module.parameters())
    layer.weight = nn.Parameter(weight.clone() if shared else weight.contiguous())
    if layer.bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    _check(module, layer, geometry)
    return layer


def _impulse_response(module: nn.Module, geometry: Geometry, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a module's response to an impulse for each row of channels, and to zeros.

    Args:
        module: as in `find_geometry`.
        geometry: the positions of the taps.
        rows: (R, C_in), the amplitude of the impulse in each input channel.

    Returns:
        (R, C_out, *kernel) and (C_out,).
    """
    g = list(
        zip(geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)  # noqa: B905
    )
    response = torch.zeros(len(rows), geometry.out_channels, *geometry.kernel_size).double()
    # Far enough from the borders that every tap reaches the impulse from some output.
    margin = [max(0, d * (k - 1) - p) for k, _, p, d in g]
    size = [2 * m + s for m, (_, s, _, _) in zip(margin, g, strict=True)]
    zero = module(torch.zeros(1, rows.shape[1], *size, dtype=torch.float64))
    middle = tuple(n // 2 for n in zero.shape[2:])
    unfolded = math.prod(size) * max(
        math.prod(geometry.kernel_size) * geometry.in_channels // geometry.groups,
        *(rows.shape[1], geometry.out_channels),
    )
    chunk = max(1, _CHUNK // unfolded)
    for phase in itertools.product(*(range(s) for _, s, _, _ in g)):
        at = tuple(m + f for m, f in zip(margin, phase, strict=True))
        # Output o looks at the inputs s o - p + d k for k = 0 .. kernel_size - 1.
        overlaps = [
            [(k, (i + p - d * k) // s) for k in range(taps) if (i + p - d * k) % s == 0]
            for i, (taps, s, p, d) in zip(at, g, strict=True)
        ]
        if not all(overlaps):
            continue
        for start in range(0, len(rows), chunk):
            chosen = rows[start : start + chunk]
            x = torch.zeros(*chosen.shape, *size, dtype=torch.float64)
            impulse: tuple[Any, ...] = (..., *at)
            x[impulse] = chosen
            difference_to_zero = module(x) - zero  # (R, C_out, *out)
            for taps in itertools.product(*overlaps):
                tap, place = tuple(k for k, _ in taps), tuple(o for _, o in taps)
                if any(o >= n for o, n in zip(place, zero.shape[2:], strict=True)):
                    raise NotAConvolutionError("the size of its output is not a convolution's")
                there: tuple[Any, ...] = (slice(start, start + chunk), slice(None), *tap)
                here: tuple[Any, ...] = (..., *place)
                response[there] = difference_to_zero[here]
    return response, zero[(0, slice(None), *middle)]


def mixtures(channels: int, groups: int) -> Tensor:
    """Return two (2, C) mixtures of channels; the second has another factor for each group."""
    mixture = torch.rand(channels, generator=seeded(0), dtype=torch.float64) + 0.5
    return torch.stack([mixture, mixture * _factors(channels, groups)])


def keeps_groups_apart(responses: Tensor, of: int, groups: int) -> bool:
    """Return whether no group of input channels affects another group's output channels.

    Then each output channel sees the factor of its own group only. With random weights, it cannot
    look so otherwise.

    Args:
        responses: (2, C_out, *taps), the responses to `mixtures(C_in, of)`.
        of: the number of groups of which each has its factor.
        groups: the number of groups that is asked for, `of` or 1.
    """
    first, second = responses
    if groups == 1 or len(first) % of:
        return groups == 1
    factors = _factors(len(first), of).view(-1, *[1] * (first.ndim - 1))
    return bool((second - factors * first).abs().max() <= NO_TAP * responses.abs().max())


def _factors(channels: int, groups: int) -> Tensor:
    return torch.linspace(1, 2, groups, dtype=torch.float64).repeat_interleave(channels // groups)


def _probe_size(reach: int, stride: int) -> int:
    return 2 * reach + 2 * stride + 1


def _refuse_large(channels: int, axes: int, reach: int, stride: int) -> None:
    one = channels * _probe_size(reach, stride) ** axes
    if one > _LARGEST or one * stride**axes > _PROBES:
        raise NotAConvolutionError(
            f"it reaches {reach} steps far at stride {stride}, too large to be probed"
        )


@torch.no_grad()
def _spatial_shape(mixed: _Mixed, axes: int, reach: int, stride: int) -> Geometry:
    """Find the taps, the stride and the padding of a module with one input channel."""
    size = _probe_size(reach, stride)
    zero = _response_to_zeros(mixed, (1, 1, *[size] * axes))
    longer = _response_to_zeros(mixed, (1, 1, *[size + stride] * axes))
    growth = [b - a for a, b in zip(zero.shape[2:], longer.shape[2:], strict=True)]
    if zero.ndim != axes + 2 or not all(g > 0 and stride % g == 0 for g in growth):
        raise NotAConvolutionError("its output does not grow with its input")
    steps = tuple(stride // g for g in growth)
    offsets: list[set[int]] = [set() for _ in range(axes)]
    phases = list(itertools.product(*(range(s) for s in steps)))
    chunk = max(1, _CHUNK // (mixed.mixture.numel() * size ** (2 * axes)))
    responses = []
    for start in range(0, len(phases), chunk):
        chosen = phases[start : start + chunk]
        x = torch.zeros(len(chosen), 1, *[size] * axes, dtype=torch.float64)
        for row, phase in enumerate(chosen):
            x[(row, 0, *(reach + f for f in phase))] = 1.0
        responses.append((mixed(x) - zero).abs().amax(1))
    weights = torch.cat(responses)  # (phases, *out)
    for row, *place in (weights > NO_TAP * weights.max()).nonzero().tolist():
        for found, f, s, o in zip(offsets, phases[row], steps, place, strict=True):
            found.add(reach + f - s * o)
    taps = [sorted(found) for found in offsets]
    return as_geometry(taps, steps, 1, zero.shape[1], bool(zero.abs().max() > 0))


def _response_to_zeros(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return module(torch.zeros(shape, dtype=torch.float64))


def seeded(seed: int) -> torch.Generator:
    """Return a generator of random numbers."""
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _check(module: nn.Module, layer: nn.Module, geometry: Geometry) -> None:
    """Compare both on random inputs, from a single pixel to more than the kernel covers."""
    generator = seeded(1)
    compared = 0
    for i, (size, needed) in enumerate(_check_sizes(geometry)):
        if compared and not needed and _work(geometry, size) > _WORK:
            continue
        shape = (2 if i == 0 else 1, geometry.in_channels, *size)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        try:
            expected = module(x.clone())
        except Exception:
            # The module does not take inputs this small; its code may raise anything.
            continue
        compared += 1
        try:
            found = difference(expected, layer(x))
        except (RuntimeError, ValueError) as error:
            raise NotAConvolutionError("the size of its output is not a convolution's") from error
        if not found.max_rel <= TOLERANCE:
            raise NotAConvolutionError(
                f"it differs from its best convolution by {found.max_rel:.1e} of the largest "
                "output: its borders, or its channels, are not treated alike"
            )
    if not compared:
        raise NotAConvolutionError("it takes no input of the sizes it was tried on")


def _check_sizes(geometry: Geometry) -> list[tuple[tuple[int, ...], bool]]:
    """Return input sizes, and whether each must be compared even if that takes long.

    Each axis gets odd and even sizes, and all remainders of the stride. From `whole` on, all taps
    are used.
    """
    axes = list(
        zip(geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    )
    spans = [d * (k - 1) for k, _, _, d in axes]
    whole = [max(1, span - p + 1) for span, (_, _, p, _) in zip(spans, axes, strict=True)]
    steps = geometry.stride
    phases = min(max(2, *steps), 8) if steps else 2
    small = [tuple(n + i for i in range(len(axes))) for n in (1, 2, 3)]
    covering = [tuple(n + j + i for i, n in enumerate(whole)) for j in range(phases)]
    larger = [
        tuple(span + s * (3 + i) for i, (span, s) in enumerate(zip(spans, steps, strict=True))),
        tuple(
            2 * span + s * 5 + 1 - i for i, (span, s) in enumerate(zip(spans, steps, strict=True))
        ),
    ]
    needed = {*small, covering[0], larger[0]} if math.prod(spans) < 64 else {*small, covering[0]}
    sizes = dict.fromkeys([*small, *covering, *larger]) if axes else [()] * 3
    return [(size, size in needed) for size in sizes]


def _work(geometry: Geometry, size: tuple[int, ...]) -> int:
    """Return the work of one layer in multiply-adds.

    To unfold a number of the input takes as long as some multiply-adds of a matrix product.
    """
    unfolded = math.prod(size) * math.prod(geometry.kernel_size) * geometry.in_channels
    return unfolded * (64 + geometry.out_channels // geometry.groups)


def randomised(module: nn.Module) -> nn.Module:
    """Fill a module's weights and statistics, in place, with random numbers of order one."""
    generator = seeded(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                signed = isinstance(tensor, nn.Parameter)
                tensor.copy_(random_like(tensor, signed, generator))
    return module


def random_like(tensor: Tensor, signed: bool, generator: torch.Generator) -> Tensor:
    """Return random numbers of order one; if not signed positive, as variances must be.

    They are products of one random number for each index: to draw all is what takes long.
    """
    made = tensor.new_ones(())
    for size in tensor.shape:
        numbers = torch.empty(size, dtype=tensor.dtype).uniform_(-1, 1, generator=generator)
        numbers = numbers.add_(numbers.sign(), alpha=0.5) if signed else numbers.abs_().add_(0.5)
        made = made[..., None] * numbers
    return made
