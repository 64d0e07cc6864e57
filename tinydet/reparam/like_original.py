"""Dtype, device and memory format of a folded network's tensors, as in the original network."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tinydet.reparam.exact import plain_tensors

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def like_original(folded: nn.Module, original: nn.Module, counters: Sequence[str] = ()) -> None:
    """Give each tensor of a folded network, in place, the form of its source in the original.

    A tensor's source is the original's tensor of the same name. Where there is none, it is the
    first kernel of the block that was merged (the first tensor, if the block has no kernel): norms
    may be kept in float32 beside bfloat16 convolutions. The source gives the device, and floating
    tensors their dtype. A 4-D or 5-D tensor is channels_last if one of the block's kernels is.

    Tensors in plain attributes, such as caches, become those of the original.

    Args:
        folded: parameters and buffers in any dtype, on any device; shared ones stay shared.
        original: the network it was made from.
        counters: names of buffers that change in each pass, and get the original's values.
    """
    like = dict(_tensors(original))
    for name, tensor in _tensors(folded):
        sources = [like[name]] if name in like else _inside(name, like)
        if sources:
            first = next((t for t in sources if t.ndim > 1), sources[0])
            dtype = first.dtype if tensor.is_floating_point() else tensor.dtype
            kernels = (t for t in sources if t.ndim == tensor.ndim)
            tensor.data = tensor.data.to(dtype).to(
                first.device, memory_format=memory_format_of(*kernels)
            )
    buffers = dict(folded.named_buffers())
    for name in counters:
        if name in buffers and buffers[name].shape == like[name].shape:
            buffers[name].copy_(like[name])
    originals = dict(original.named_modules())
    for name, module in folded.named_modules():
        known = plain_tensors(originals[name]) if name in originals else {}
        kept = {n: copy.deepcopy(known[n]) for n in plain_tensors(module) if n in known}
        vars(module).update(kept)


def memory_format_of(*kernels: Tensor) -> torch.memory_format:
    """Return channels_last (4-D) or channels_last_3d (5-D) if a kernel has it, else the default.

    The kernels of 1x1 and of depthwise convolutions lie in memory in both ways at once; they count
    as the default.
    """
    for kernel in kernels:
        last = _CHANNELS_LAST.get(kernel.ndim)
        if last and kernel.is_contiguous(memory_format=last) and not kernel.is_contiguous():
            return last
    return torch.contiguous_format


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )


def _inside(name: str, like: dict[str, Tensor]) -> list[Tensor]:
    """Return the floating tensors of the smallest part of the original that covers a new name."""
    found: list[Tensor] = []
    while name and not found:
        name = name.rpartition(".")[0]
        prefix = f"{name}." if name else ""
        found = [t for n, t in like.items() if n.startswith(prefix) and t.is_floating_point()]
    return found
