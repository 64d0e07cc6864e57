"""Bias correction (arXiv 1906.04721, section 4.2) of an ONNX network about to be quantised.

Rounding the weights by e moves a convolution's mean output by e times its mean input. The mean
input is measured on images, and the shift taken off the bias. Zero padding is left out of account:
there the mean input is a little smaller.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto
from torch import Tensor

from tinydet.deployment.activations import channel_stats
from tinydet.deployment.onnx_graph import find_convs, store_conv

_LEVELS = 127  # int8, symmetric


def correct_biases(
    model: ModelProto, batches: Iterable[Tensor], leave: frozenset[str] = frozenset()
) -> None:
    """Take what rounding will add on average off the biases, in place.

    Args:
        model: the float network that will be quantised with a scale for each output channel.
        batches: inputs on which mean values are measured.
        leave: names of the nodes that will not be quantised.
    """
    convs = [conv for conv in find_convs(model).values() if conv.node.name not in leave]
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
    """Return a weight (O, ...) after int8 with a symmetric scale for each output channel."""
    scale = np.abs(weight).reshape(len(weight), -1).max(axis=1) / _LEVELS
    scale = np.where(scale > 0, scale, 1).reshape(-1, *(1,) * (weight.ndim - 1))
    return (np.round(weight / scale).clip(-_LEVELS, _LEVELS) * scale).astype(np.float32)
