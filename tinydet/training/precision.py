"""The dtype and memory format of a training step; on a CPU "auto" measures them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydet.config import ConfigError, Train
from tinydet.progress import Progress
from tinydet.reparam.expand import ExpandedConv2d
from tinydet.reparam.module_class import class_of, set_class, with_mixin
from tinydet.reparam.online import BranchKernels
from tinydet.training.device import fast_memory_format, training_dtypes
from tinydet.training.distributed import world_size
from tinydet.training.folded_stages import fold_frozen_stages, is_folded
from tinydet.training.fused_norms import fuse_frozen_norms, undo_fused_norms

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Precision:
    """How a training step runs.

    Attributes:
        dtype: of autocast; "float32" is without.
        memory_format: of weights and images.
        reason: how it was chosen, in one line.
    """

    dtype: str
    memory_format: str
    reason: str

    @property
    def torch_format(self) -> torch.memory_format:
        """The memory format as torch's object."""
        return _FORMATS[self.memory_format]

    def prepare(self, model: nn.Module) -> None:
        """Convert a model's weights to the memory format, and some layers for a CPU.

        Call it again after other weights are loaded.
        """
        model.to(memory_format=self.torch_format)
        if next(model.parameters()).device.type == "cpu":
            undo_fused_norms(model)
            _undo_prepare_for_cpu(model)  # Folded stages have layers of their own classes.
            fold_frozen_stages(model, self.torch_format)
            prepare_for_cpu(model, bfloat16=self.dtype == "bfloat16")
            fuse_frozen_norms(model)

    @contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        """Autocast the forward pass to this dtype."""
        enabled = self.dtype != "float32"
        with torch.autocast(device.type, _DTYPES[self.dtype], enabled=enabled):
            yield


def choose_precision(
    train: Train,
    device: torch.device,
    detector: nn.Module,
    images: Tensor,
    targets: Sequence[dict[str, Tensor]],
) -> Precision:
    """Return the experiment's precision, with "auto" resolved for this model and device.

    On a GPU "auto" is the first of its `training_dtypes`, and its `fast_memory_format`. On a CPU
    the speed of formats and dtypes differs by several times from model to model, so training steps
    of a copy are timed.

    Raises:
        ConfigError: the device does not train in that dtype.
    """
    dtypes, formats = training_dtypes(device), tuple(_FORMATS)
    if train.dtype != "auto" and train.dtype not in dtypes:
        raise ConfigError(
            f"train.dtype={train.dtype}: device {device} trains in {' or '.join(dtypes)}; "
            "set one of these, or auto"
        )
    if "auto" not in (train.dtype, train.memory_format):
        return Precision(train.dtype, train.memory_format, "set by the experiment")
    if train.dtype != "auto":
        dtypes = (train.dtype,)
    if train.memory_format != "auto":
        formats = (train.memory_format,)
    elif device.type != "cpu":
        formats = tuple(f for f in formats if _FORMATS[f] == fast_memory_format(device))
    if device.type != "cpu":
        return Precision(dtypes[0], formats[0], "default on a GPU")
    seconds: dict[tuple[str, str], float] = {}
    choices = list(product(formats, dtypes))
    with Progress("timing dtypes and memory formats", len(choices), "timed") as progress:
        for memory_format, dtype in choices:
            candidate = Precision(dtype, memory_format, "")
            best = min(seconds.values(), default=float("inf"))
            seconds[dtype, memory_format] = _time_step(candidate, detector, images, targets, best)
            progress.advance()
    dtype, memory_format = min(seconds, key=seconds.__getitem__)
    timings = ", ".join(f"{d} {f} {s:.2f} s" for (d, f), s in sorted(seconds.items()))
    return Precision(dtype, memory_format, f"fastest of {timings} per step")


def _time_step(
    precision: Precision,
    detector: nn.Module,
    images: Tensor,
    targets: Sequence[dict[str, Tensor]],
    best: float,
) -> float:
    """Return the seconds of a training step: the shorter of two after one warm-up step.

    A candidate whose warm-up step took twice the best time so far is given up, unless other
    processes would wait for its remaining steps.
    """
    model = copy.deepcopy(detector)
    precision.prepare(model)
    images = images.contiguous(memory_format=precision.torch_format)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with precision.autocast(images.device):
            losses, _ = model(images, targets)
        sum(losses.values()).backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
        if seconds[0] > 2 * best and world_size() == 1:
            break
    return min(seconds)


def prepare_for_cpu(model: nn.Module, bfloat16: bool) -> None:
    """Swap the class of convolutions that a CPU computes badly; function and weights stay the same.

    Strided 1x1 convolutions of few channels subsample their input first: oneDNN writes beyond its
    workspace in their backward pass and the process crashes (github.com/uxlfoundation/oneDNN,
    number 6035; to be removed once torch ships the fix). Depthwise 1x1 ones without a stride are
    computed as what they are, a product with a factor for each channel, up to 20 times as fast. In
    bfloat16, other grouped convolutions run in float32, where the backward pass of most is several
    times faster. Branches inside a weight see no image, and are composed from layers of torch's own
    classes.
    """
    inside = {
        part
        for module in model.modules()
        if isinstance(module, BranchKernels)
        for part in module.modules()
    }
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or is_folded(module):
            continue
        kind, strided = class_of(module), max(module.stride) > 1
        plain_1x1 = module.kernel_size == (1, 1) and kind in (nn.Conv2d, ExpandedConv2d)
        if plain_1x1 and strided and module.in_channels < 16:
            set_class(module, with_mixin(_Subsampled, kind))  # type: ignore[arg-type]
        elif module in inside:
            continue
        elif plain_1x1 and not strided and module.groups == module.in_channels > 1:
            set_class(module, with_mixin(_Scaling, kind))  # type: ignore[arg-type]
        elif bfloat16 and module.groups > 1:
            set_class(module, with_mixin(_InFloat32, kind))  # type: ignore[arg-type]


def _undo_prepare_for_cpu(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (_Subsampled, _Scaling, _InFloat32)):
            set_class(module, class_of(module).__mro__[2])


class _Subsampled(nn.Module):
    """Mixin before a conv class: subsamples the input of a strided 1x1 convolution."""

    stride: tuple[int, int]
    groups: int

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = _padded(x, self)[..., :: self.stride[0], :: self.stride[1]]
        return F.conv2d(x, weight, bias, groups=self.groups)


class _Scaling(nn.Module):
    """Mixin before a conv class: a 1x1 depthwise convolution as a product."""

    groups: int
    out_channels: int

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = _padded(x, self)
        if torch.is_autocast_enabled(x.device.type):  # Products are not cast, as convolutions are.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.out_channels > self.groups:
            x = x.repeat_interleave(self.out_channels // self.groups, dim=1)
        y = x * weight.to(x.dtype).view(-1, 1, 1)  # (B, outputs, H, W)
        return y if bias is None else y + bias.to(x.dtype).view(-1, 1, 1)


def _padded(x: Tensor, conv: Any) -> Tensor:
    """Pad the input of a conv as it does itself, in any mode."""
    pads = conv._reversed_padding_repeated_twice  # (left, right, top, bottom), also of "same"
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, pads, mode) if any(pads) else x


class _InFloat32(nn.Module):
    """Mixin before a layer class: runs the layer outside autocast."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))
