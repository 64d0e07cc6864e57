"""Inputs and outputs of each module of a network in one forward pass, and their channel axes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinydet.reparam.dataflow import DataFlow, Op, Recorder, View, calls_noted

_AXIS_1 = {
    f"aten.{name}"
    for name in ("convolution", "mkldnn_convolution", "native_batch_norm", "cudnn_batch_norm",
                 "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
                 "native_group_norm", "max_pool2d_with_indices", "avg_pool2d")
}  # fmt: skip
_AXIS_LAST = {"aten.addmm", "aten.mm", "aten.linear", "aten._fused_rms_norm"}


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
        name: the module's qualified name.
        module: the module.
        inputs: its tensor arguments.
        output: the tensor it returned; None if it returned anything else.
        ops: the operations run inside it and its children.
    """

    name: str
    module: nn.Module
    inputs: tuple[View, ...]
    output: View | None
    ops: list[Op]


def trace_modules(
    model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[DataFlow, dict[nn.Module, list[ModuleCall]]]:
    """Run a network once, in eval mode and without gradients, and record the calls of each module.

    Args:
        model: the network; its state is unchanged.
        inputs: positional arguments.

    Returns:
        The data flow, and the calls of each module that ran, in the order of `model.modules()`.
    """
    recorder = Recorder()
    found: dict[nn.Module, list[ModuleCall]] = {module: [] for module in model.modules()}
    open_calls: list[tuple[tuple[View, ...], int]] = []
    handles = []
    for name, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            del module
            open_calls.append((recorder.views((args, kwargs)), len(recorder.flow.ops)))

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            del args
            given, start = open_calls.pop()
            views = recorder.views(output) if isinstance(output, Tensor) else ()
            ops = recorder.flow.ops[start:]
            call = ModuleCall(name, module, given, views[0] if views else None, ops)
            found[module].append(call)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        noted = calls_noted(model, recorder, lambda _: False)
        with eval_mode(model), torch.no_grad(), noted, recorder:
            recorder.flow.inputs = recorder.views(inputs)
            recorder.flow.returned = model(*inputs)
            recorder.flow.outputs = recorder.views(recorder.flow.returned)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.flow, {module: calls for module, calls in found.items() if calls}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Temporarily put all modules in eval mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def channel_axis(flow: DataFlow, view: View) -> int | None:
    """Return the channel axis of a tensor, or None if the data flow does not determine it.

    Convolutions, batch and group norms have their channels in axis 1, linear layers and layer norms
    in the last axis. Elementwise operations keep the axis, and a view of a tensor moves it with its
    memory.
    """
    return _from_producer(flow, view, 64) if view.shape else None


def _from_producer(flow: DataFlow, view: View, depth: int) -> int | None:
    op = flow.producer(view.value)
    axis = None
    if op is not None and depth:
        made = next(out for out in op.outputs if out.value == view.value)
        axis = _follow_view(made, _axis_made(flow, op, made, depth), view)
    return _from_readers(flow, view) if axis is None else axis


def _axis_made(flow: DataFlow, op: Op, made: View, depth: int) -> int | None:
    """Return the channel axis of an operation's output."""
    if op.name in _AXIS_1:
        return 1
    if op.name in _AXIS_LAST or _is_layer_norm(op):
        return len(made.shape) - 1
    for given in op.inputs:
        if len(given.shape) == len(made.shape) and flow.producer(given.value) is not None:
            axis = _from_producer(flow, given, depth - 1)
            if axis is not None and _keeps(op, given, made, axis):
                return axis
    return None


def _keeps(op: Op, given: View, made: View, axis: int) -> bool:
    return given.shape[axis] == made.shape[axis] or op.name == "aten.cat"


def _from_readers(flow: DataFlow, view: View) -> int | None:
    for op in flow.readers(view.value):
        for read in op.inputs[:2]:  # The bias may precede the input, the weight never does.
            if read.value != view.value:
                continue
            if op.name in _AXIS_1:
                axis = _follow_view(read, 1, view)
            elif op.name in _AXIS_LAST or _is_layer_norm(op):
                axis = _follow_view(read, len(read.shape) - 1, view)
            else:
                continue
            if axis is not None:
                return axis
    return None


def _is_layer_norm(op: Op) -> bool:
    return op.name == "aten.native_layer_norm" and len(op.args[1]) == 1


def _follow_view(made: View, axis: int | None, view: View) -> int | None:
    """Return the axis of `view` that matches an axis of `made`, a view of the same memory."""
    if axis is None or axis >= len(made.shape):
        return None
    if (made.shape, made.stride) == (view.shape, view.stride):
        return axis
    wanted = (made.shape[axis], made.stride[axis])
    axes = [i for i, a in enumerate(zip(view.shape, view.stride, strict=True)) if a == wanted]
    if len(axes) == 1:
        return axes[0]
    # A slice of the channels: all other axes are unchanged.
    rest = [a for i, a in enumerate(zip(made.shape, made.stride, strict=True)) if i != axis]
    here = list(zip(view.shape, view.stride, strict=True))
    parts = [i for i in range(len(here)) if here[i][1] == wanted[1]]
    parts = [i for i in parts if sorted(here[:i] + here[i + 1 :]) == sorted(rest)]
    return parts[0] if len(parts) == 1 else None
