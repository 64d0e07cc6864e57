"""Prepare a folded ONNX network for int8: cross-layer equalization and bias correction.

Both are from arXiv 1906.04721. Equalization (section 4.1): where a convolution's channels are read
by convolutions only, directly or through ReLU, a channel can be divided by a factor and the weights
that read it multiplied by it without changing the function. Here the factors are powers of two, so
every float stays the same to the last bit.

The paper balances the ranges of the weights on either side. Weights that have a scale for each
output channel do not need that on the writing side, but the activations between do: they share one
scale, and a channel a hundred times smaller than the largest has two of the 8 bits left. So each
channel's largest activation is balanced against the weights that read it (arXiv 2211.10438,
equation 4, with alpha = 0.5), relative to the largest weight of their rows, since each row has its
own scale.

Bias correction (section 4.2): rounding the weights by e shifts a convolution's mean output by e
times its mean input. The mean input is measured on images and the shift subtracted from the bias.
Zero padding, where the mean input is a little smaller, is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from onnx import ModelProto
from torch import Tensor

from tinydet.deployment.onnx_graph import (
    Conv,
    channel_stats,
    find_convs,
    find_readers,
    store_conv,
)

_SWEEPS = 20  # far more than the weights need to converge
_LARGEST_FACTOR = 2.0**10  # a channel that is nearly zero is not scaled up further
_LEVELS = 127  # int8, symmetric


def prepare_for_int8(model: ModelProto, images: Sequence[Tensor]) -> tuple[ModelProto, int]:
    """Return a copy that loses less accuracy when it is quantized.

    The copy computes the same function except for its biases, which are off by what rounding will
    add.

    Args:
        model: the float network, folded.
        images: batches (B, 3, H, W) uint8.

    Returns:
        The copy, and the number of places between convolutions that were equalized.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    places = equalize(copy, images)
    correct_biases(copy, images)
    return copy, places


def equalize(model: ModelProto, batches: Iterable[Tensor]) -> int:
    """Balance the channels between convolutions, in place.

    Args:
        model: a folded network.
        batches: inputs on which the channels' ranges are measured.

    Returns:
        The number of places between convolutions that could be balanced.
    """
    convs = find_convs(model)
    places = _places(model, convs)
    stats = channel_stats(model, [name for name, _ in places.values()], batches) if places else {}
    largest = {output: stats[name].largest.copy() for output, (name, _) in places.items()}
    for _ in range(_SWEEPS):
        changed = [
            _balance(convs[output], readers, largest[output])
            for output, (_, readers) in places.items()
        ]
        if not any(changed):
            break
    for conv in convs.values():
        store_conv(model, conv)
    return len(places)


def correct_biases(model: ModelProto, batches: Iterable[Tensor]) -> None:
    """Subtract from the biases what rounding the weights will add on average, in place.

    Args:
        model: the float network that will be quantized with a scale for each output channel.
        batches: inputs on which means are measured.
    """
    convs = list(find_convs(model).values())
    stats = channel_stats(model, [conv.node.input[0] for conv in convs], batches)
    for conv in convs:
        mean = stats[conv.node.input[0]].mean  # (C,)
        error = rounded(conv.weight).astype(np.float64) - conv.weight
        per_channel = error.reshape(*error.shape[:2], -1).sum(axis=2)  # (O, C / G)
        by_group = per_channel.reshape(conv.groups, -1, per_channel.shape[1])
        shift = np.einsum("goc,gc->go", by_group, mean.reshape(conv.groups, -1)).reshape(-1)
        bias = np.zeros(len(shift)) if conv.bias is None else conv.bias
        conv.bias = (bias - shift).astype(np.float32)
        store_conv(model, conv)


def rounded(weight: np.ndarray) -> np.ndarray:
    """Round a weight (O, ...) to int8 with a symmetric scale for each output channel."""
    scale = np.abs(weight).reshape(len(weight), -1).max(axis=1) / _LEVELS
    scale = np.where(scale > 0, scale, 1).reshape(-1, *(1,) * (weight.ndim - 1))
    return (np.round(weight / scale).clip(-_LEVELS, _LEVELS) * scale).astype(np.float32)


def _places(model: ModelProto, convs: Mapping[str, Conv]) -> dict[str, tuple[str, list[Conv]]]:
    """Return, for each conv that only convs read, the value they read and those convs."""
    readers = find_readers(model)
    places = {}
    for output in convs:
        name, nodes = output, readers[output]
        if len(nodes) == 1 and nodes[0].op_type == "Relu":
            name = nodes[0].output[0]
            nodes = readers[name]
        following = [
            convs[node.output[0]] for node in nodes if node.output and node.output[0] in convs
        ]
        reads_values = all(
            node.input[0] == name and list(node.input).count(name) == 1
            for node in nodes
            if node.input
        )
        if following and len(following) == len(nodes) and reads_values:
            places[output] = (name, following)
    return places


def _balance(conv: Conv, readers: Sequence[Conv], largest: np.ndarray) -> bool:
    """Divide a conv's channels, multiply the weights that read them; say if any changed."""
    dense = [_shares(reader) for reader in readers if reader.weight.shape[1] > 1]
    # The weights of a depthwise conv have a scale for each channel: they can take all of it.
    weights = np.max(dense, axis=0) if dense else np.ones_like(largest)  # (C,)
    exponent = 0.5 if dense else 1.0
    alive = (largest > 0) & (weights > 0)
    logs = np.log2(np.where(alive, largest, 1) / np.where(alive, weights, 1))
    logs -= logs[alive].mean() if alive.any() else 0
    factors = np.exp2(np.round(exponent * logs)).clip(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    factors = np.where(alive, factors, 1).astype(np.float32)
    if (factors == 1).all():
        return False
    largest /= factors
    conv.weight /= factors.reshape(-1, *(1,) * (conv.weight.ndim - 1))
    if conv.bias is not None:
        conv.bias /= factors
    for reader in readers:
        scaled = reader.by_group() * factors.reshape(reader.groups, 1, -1, 1)
        reader.weight = scaled.reshape(reader.weight.shape)
    return True


def _shares(conv: Conv) -> np.ndarray:
    """Return how much of its rows' ranges the weights of each input channel take, (C,)."""
    weight = np.abs(conv.by_group()).max(axis=3)  # (G, O / G, C / G)
    rows = weight.max(axis=2, keepdims=True)
    shares: np.ndarray = (weight / np.where(rows > 0, rows, 1)).max(axis=1).reshape(-1)
    return shares
