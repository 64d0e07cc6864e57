"""Cross-layer equalisation (arXiv 1906.04721, section 4.1) of an ONNX network.

Where a convolution's channels go through ReLU, or through nothing, into convolutions alone, a
channel can be divided by a factor and the weights that read it multiplied: the function stays. Here
the factors are powers of two, so every float stays the same to the last bit.

The paper balances the ranges of the weights on either side. Where the weights have a scale for each
output channel, those before do not need it. What does is the values between: they share one scale,
and a channel a hundred times smaller than the largest has two of 8 bits left. So each channel's
largest value is balanced with the weights that read it (arXiv 2211.10438, equation 4, with alpha =
0.5), measured by their rows' largest, since these have a scale each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import ModelProto
from torch import Tensor

from tinydet.deployment.activations import channel_stats
from tinydet.deployment.onnx_graph import Conv, find_convs, find_readers, store_conv

_SWEEPS = 20  # far more than weights need to settle
_MOST = 2.0**10  # a channel that is all but dead is not blown up further


def equalize(model: ModelProto, batches: Iterable[Tensor]) -> int:
    """Balance the channels between convolutions, in place.

    Args:
        model: a folded network.
        batches: inputs on which the channels' ranges are read.

    Returns:
        The number of places between convolutions that could be balanced.
    """
    convs = find_convs(model)
    places = _places(model, convs)
    stats = channel_stats(model, [name for name, _ in places.values()], batches) if places else {}
    largest = {output: stats[name].largest.copy() for output, (name, _) in places.items()}
    for _ in range(_SWEEPS):
        steps = [
            _balance(convs[output], readers, largest[output])
            for output, (_, readers) in places.items()
        ]
        if not any(steps):
            break
    for conv in convs.values():
        store_conv(model, conv)
    return len(places)


def _places(model: ModelProto, convs: Mapping[str, Conv]) -> dict[str, tuple[str, list[Conv]]]:
    """Return, for each conv that only convs read, the value they read and those convs."""
    readers = find_readers(model)
    places = {}
    for output in convs:
        name, reading = output, readers[output]
        if len(reading) == 1 and reading[0].op_type == "Relu":
            name = reading[0].output[0]
            reading = readers[name]
        following = [convs.get(node.output[0]) if node.output else None for node in reading]
        reads_values = all(
            node.input[0] == name and list(node.input).count(name) == 1
            for node in reading
            if node.input
        )
        if following and all(following) and reads_values:
            places[output] = (name, following)
    return places


def _balance(conv: Conv, readers: list[Conv], largest: np.ndarray) -> bool:
    """Divide a conv's channels, multiply the weights that read them; say if any changed."""
    dense = [_shares(reader) for reader in readers if reader.weight.shape[1] > 1]
    # The weights of a depthwise conv have a scale for each channel: they can take all of it.
    weights = np.max(dense, axis=0) if dense else np.ones_like(largest)  # (C,)
    exponent = 0.5 if dense else 1.0
    alive = (largest > 0) & (weights > 0)
    logs = np.log2(np.where(alive, largest, 1) / np.where(alive, weights, 1))
    logs -= logs[alive].mean() if alive.any() else 0
    factors = np.exp2(np.round(exponent * logs)).clip(1 / _MOST, _MOST)
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
    return (weight / np.where(rows > 0, rows, 1)).max(axis=1).reshape(-1)
