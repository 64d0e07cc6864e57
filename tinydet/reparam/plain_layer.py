"""The plain torch layer that a module computes: one convolution, linear layer or batch norm.

What the module does is read from the operations that it runs. The layer is compared with it on
inputs of several sizes. Which layer is taken is decided with random weights, so that it depends on
the architecture alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from tinydet.reparam.affine import is_affine, is_layer
from tinydet.reparam.dataflow import SIZE_ONLY, Op, observe
from tinydet.reparam.equivalent_layer import randomised
from tinydet.reparam.fuse_affine import PADS
from tinydet.reparam.verify import TOLERANCE, difference

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_ZERO_PADS: dict[int, Any] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
_BATCH_NORMS: dict[int, Any] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_ADDS = {"aten.add", "aten.add_"}
# Operations with constants of which a frozen norm consists.
SCALES = {"aten.mul", "aten.mul_", "aten.div", "aten.div_", "aten.sub", "aten.sub_", *_ADDS}


class NotPlainError(ValueError):
    """A module is no plain layer; the message says why."""


def right_operand(op: Op) -> Tensor:
    """Return the right operand of a product."""
    return cast(Tensor, op.args[2 if op.name in ("aten.addmm", "aten.baddbmm") else 1])


@torch.no_grad()
def plain_layer(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Return the plain layer that is equivalent to a module.

    Args:
        module: takes one tensor and returns one; in float64 and eval mode.
        shape: an input shape that it takes.

    Raises:
        NotPlainError: it is no single convolution, linear layer or batch norm with fixed weights.
    """
    try:
        generic = randomised(copy.deepcopy(module))
        agree = (_agree(generic, one, shape) for one in _candidates(generic, shape))
        number = next((i for i, same in enumerate(agree) if same), None)
        if number is None:
            raise NotPlainError("it differs from the plain layer of its geometry")
        layer = list(_candidates(module, shape))[number]
        if not _agree(module, layer, shape):
            raise NotPlainError("it differs from the plain layer with its weights")
    except NotPlainError:
        raise
    except Exception as error:
        # This runs any code with weights it was not made for, which may fail in any way.
        raise NotPlainError(f"it does not run alone ({type(error).__name__})") from error
    trained = [p.requires_grad for p in module.parameters()]
    return layer.requires_grad_(any(trained))


def _candidates(module: nn.Module, shape: tuple[int, ...]) -> Iterator[nn.Module]:
    """Yield the plain layers that a module may be, judged by what it does to one input."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = observe(module, (x,), is_leaf=lambda _: False)
    data = flow.depends_on_input()
    work = [
        op for op in flow.ops if op.varying(data) and not op.is_view and op.name not in SIZE_ONLY
    ]
    products = [i for i, op in enumerate(work) if is_layer(op, data)]
    if not isinstance(flow.returned, Tensor):
        raise NotPlainError("it returns more than one tensor")
    if len(products) == 1:
        (at,) = products
        before, op, after = work[:at], work[at], work[at + 1 :]
        adds = all(o.name in _ADDS and len(o.varying(data)) == 1 for o in after)
        if adds and all(o.name in PADS for o in before):
            zero = cast(Tensor, module(torch.zeros_like(x)))
            yield from _layers(module, op, before, zero, biased=bool(after))
            return
    elif [op.name for op in work] == ["aten.native_batch_norm"] and is_affine(work[0], data):
        yield _batch_norm(work[0], len(shape))
        return
    elif len(shape) == 4 and all(o.name in SCALES and is_affine(o, data) for o in work):
        zero, one = (module(like(x)) for like in (torch.zeros_like, torch.ones_like))
        if zero.shape == x.shape:
            yield _frozen_batch_norm(one - zero, zero, module)
            return
    raise NotPlainError("it does more than a convolution, a linear layer or a batch norm")


def _layers(
    module: nn.Module, op: Op, before: list[Op], zero: Tensor, biased: bool
) -> Iterator[nn.Module]:
    """Yield the convolutions or the linear layer that multiply by the weight of an operation.

    Args:
        module: the module that ran it.
        op: the operation.
        before: the operations on the activation before it.
        zero: the module's response to zeros.
        biased: whether a constant is added afterwards.
    """
    if op.name != "aten.convolution":
        matrix = right_operand(op)  # (C_in, C_out)
        if matrix.ndim != 2:
            raise NotPlainError("its weight is no matrix")
        linear = nn.Linear(matrix.shape[0], matrix.shape[1], biased or op.name == "aten.addmm")
        yield _filled(linear, matrix.t(), zero.movedim(-1, 0))
        return
    _, weight, bias, stride, padding, dilation, transposed, output_padding, groups = op.args
    axes = weight.ndim - 2
    shape: dict[str, Any] = {"stride": tuple(stride), "dilation": tuple(dilation), "groups": groups}
    shape["bias"] = biased or bias is not None
    kernel, rows = tuple(weight.shape[2:]), zero.movedim(1, 0)
    if transposed:
        shape["output_padding"] = tuple(output_padding)
        channels = (weight.shape[0], weight.shape[1] * groups)
        layer = _TRANSPOSED[axes](*channels, kernel, padding=tuple(padding), **shape)
        yield _filled(layer, weight, rows)
        return
    channels = (weight.shape[1] * groups, weight.shape[0])
    pads = [o.args[1] for o in before if o.name == "aten.constant_pad_nd"]
    ends = [sum(p[i] if i < len(p) else 0 for p in pads) for i in range(2 * axes)]
    if ends[::2] == ends[1::2]:
        total = tuple(p + e for p, e in zip(padding, ends[::2][::-1], strict=True))
        yield _filled(_CONVS[axes](*channels, kernel, padding=total, **shape), weight, rows)
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        own: Any = {"padding": module.padding, "padding_mode": mode}
        yield _filled(_CONVS[axes](*channels, kernel, **own, **shape), weight, rows)
    if axes == 2 and not any(padding):
        yield _filled(Conv2dSame(*channels, kernel, **shape), weight, rows)
    conv = _CONVS[axes](*channels, kernel, padding=tuple(padding), **shape)
    yield nn.Sequential(_ZERO_PADS[axes](tuple(ends)), _filled(conv, weight, rows))


def _filled(layer: Any, weight: Tensor, rows: Tensor) -> nn.Module:
    """Fill a layer; `rows` is (C_out, ...), the response to zeros."""
    layer = layer.to(weight.dtype)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(rows.flatten(1)[:, 0])
    return cast(nn.Module, layer)


def _batch_norm(op: Op, ndim: int) -> nn.Module:
    """Return the layer of a batch norm with fixed statistics."""
    _, weight, bias, mean, var, _, momentum, eps = op.args
    affine = weight is not None or bias is not None
    if ndim not in _BATCH_NORMS:
        raise NotPlainError("its input is no batch")
    norm = _BATCH_NORMS[ndim](len(mean), eps=eps, momentum=momentum, affine=affine).to(mean.dtype)
    values = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    for name, value in values.items():
        if value is not None:
            getattr(norm, name).copy_(value)
    return cast(nn.Module, norm.eval())


def _frozen_batch_norm(scale: Tensor, shift: Tensor, module: nn.Module) -> nn.Module:
    """Return the norm with a fixed scale and shift, given for each place of a (B, C, H, W) map."""
    norm = FrozenBatchNorm2d(scale.shape[1], eps=0.0).to(scale.dtype)
    for name, value in (("weight", scale), ("bias", shift)):
        values = value.movedim(1, 0).flatten(1)[:, 0].clone()
        if any(p.requires_grad for p in module.parameters()):
            del norm._buffers[name]
            norm.register_parameter(name, nn.Parameter(values))
        else:
            getattr(norm, name).copy_(values)
    return norm


def _agree(module: nn.Module, layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Compare a module and a layer on inputs of the given and of other sizes."""
    generator = torch.Generator().manual_seed(1)
    for size in dict.fromkeys(_sizes(layer, shape)):
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        try:
            expected = module(x.clone())
        except Exception:
            # Any code may reject other sizes, with any exception.
            if size == shape:
                raise
            continue
        try:
            if not difference(expected, layer(x)).max_rel <= TOLERANCE:
                return False
        except (RuntimeError, ValueError):
            return False
    return True


def _sizes(layer: nn.Module, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the given input shape, then tiny, odd and even ones with as many channels."""
    yield shape
    last = layer[-1] if isinstance(layer, nn.Sequential) else layer
    channel = len(shape) - 1 if isinstance(last, nn.Linear) else 1
    dilated = zip(getattr(last, "kernel_size", ()), getattr(last, "dilation", ()), strict=True)
    spans = [d * (k - 1) for k, d in dilated]
    free = [axis for axis in range(len(shape)) if axis != channel]
    spans = [0] * (len(free) - len(spans)) + spans
    for more in range(5):
        lengths = {
            a: 1 + i + more + (s if more else 0)
            for i, (a, s) in enumerate(zip(free, spans, strict=True))
        }
        yield tuple(lengths.get(axis, n) for axis, n in enumerate(shape))
