"""What flows through an ONNX network, channel by channel, on images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto
from torch import Tensor

from tinydet.deployment.runtime import open_session


@dataclass
class ChannelStats:
    """A value (B, C, *places) over images and places.

    Attributes:
        largest: (C,) largest magnitude.
        mean: (C,).
    """

    largest: np.ndarray
    mean: np.ndarray


def channel_stats(
    model: ModelProto, names: Sequence[str], batches: Iterable[Tensor]
) -> dict[str, ChannelStats]:
    """Run a network and return the statistics of some of its values.

    Args:
        model: with one input.
        names: of float values (B, C, *places).
        batches: the inputs, at least one.

    Raises:
        ValueError: ONNX Runtime is missing or refuses the network, or there is no input.
    """
    names = list(dict.fromkeys(names))
    session = open_session(with_outputs(model, names))
    (given,) = session.get_inputs()
    largest: dict[str, np.ndarray] = {}
    total: dict[str, np.ndarray] = {}
    count: dict[str, int] = {}
    for images in batches:
        for name, value in zip(
            names, session.run(names, {given.name: images.numpy()}), strict=True
        ):
            rows = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)  # (C, B * places)
            most = np.abs(rows).max(axis=1)
            largest[name] = np.maximum(largest[name], most) if name in largest else most
            total[name] = total.get(name, 0) + rows.sum(axis=1, dtype=np.float64)
            count[name] = count.get(name, 0) + rows.shape[1]
    if not count:
        raise ValueError("no images to look at what flows through the network")
    return {name: ChannelStats(largest[name], total[name] / count[name]) for name in names}


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy that returns some of its inner values, of type float, as well."""
    copy = ModelProto()
    copy.CopyFrom(model)
    there = {output.name for output in copy.graph.output}
    for name in names:
        if name not in there:
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            copy.graph.output.append(value)
    return copy
