"""Replace TensorFlow's "same" padding by constant padding, for export.

timm's `tf_*` networks compute the padding of each strided convolution from its input's size. An
exporter with dynamic sizes must reason about it symbolically, which takes minutes or fails, and the
exported graph would compute the padding for every image. For inputs whose sides are multiples of
the network's stride the padding is always the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn


def with_fixed_padding(model: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """Return a copy whose convolutions with "same" padding use constant padding.

    Args:
        model: a network in eval mode; returned itself if it has no such convolution.
        inputs: images of different sizes, multiples of the stride. A convolution whose padding
            differs between them stays as it is.
    """
    if not any(isinstance(module, Conv2dSame) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    paddings = _observed_paddings(model, inputs)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            found = paddings.get(child, set())
            if len(found) == 1:
                setattr(parent, name, _fixed(cast(Conv2dSame, child), *found))
    return model


def _observed_paddings(
    model: nn.Module, inputs: Sequence[Tensor]
) -> dict[nn.Module, set[tuple[int, int, int, int]]]:
    paddings: dict[nn.Module, set[tuple[int, int, int, int]]] = {}

    def note(module: Conv2dSame, args: tuple[Any, ...]) -> None:
        height, width = (
            get_same_padding(side, module.kernel_size[i], module.stride[i], module.dilation[i])
            for i, side in enumerate(args[0].shape[-2:])
        )
        padding = (width // 2, width - width // 2, height // 2, height - height // 2)
        paddings.setdefault(module, set()).add(padding)

    convs = [module for module in model.modules() if type(module) is Conv2dSame]
    handles = [conv.register_forward_pre_hook(note) for conv in convs]
    try:
        with torch.no_grad():
            for images in inputs:
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    return paddings


def _fixed(conv: Conv2dSame, padding: tuple[int, int, int, int]) -> nn.Module:
    left, right, top, bottom = padding
    even = left == right and top == bottom
    kernel_size, stride, dilation = (
        cast("tuple[int, int]", pair) for pair in (conv.kernel_size, conv.stride, conv.dilation)
    )
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size,
        stride,
        (top, left) if even else 0,
        dilation,
        conv.groups,
        conv.bias is not None,
        device="meta",
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain.eval() if even else nn.Sequential(nn.ZeroPad2d(padding), plain).eval()
