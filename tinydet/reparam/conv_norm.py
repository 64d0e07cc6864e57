"""Batch norms folded into the convolution or linear layer that feeds them.

    norm(W x + b) = s (W x + b) + t = (s W) x + (s b + t),   s, t: the norm's scale and shift

Which layer feeds which norm is read from the observed data flow, never from names or order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tinydet.reparam.dataflow import Call, DataFlow, Op, View, observe, storage_of
from tinydet.reparam.hooks import give_hooks, has_hooks, has_pre_hooks
from tinydet.reparam.norms import is_norm, scale_and_shift, why_not_linear, without_norm
from tinydet.reparam.report import Step

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PRODUCTS = ("aten.convolution", "aten.addmm", "aten.mm", "aten.bmm", "aten.baddbmm", "aten.linear")


@dataclass(frozen=True)
class _Pair:
    layer: Call
    norm: Call


class _NotFoldableError(Exception):
    """Carries the reason for which a norm stays."""


def fold_norms(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Step], list[Step]]:
    """Fold, in place, every batch norm that directly follows a conv or linear layer.

    Args:
        model: the network, in eval mode; its weights are computed with in their own dtype.
        inputs: positional arguments for the observed forward pass.

    Returns:
        What was folded, and every norm that stays with its reason.
    """
    folded: list[Step] = []
    while True:
        # Again after each round: a second norm behind a folded one now follows the layer itself.
        flow = observe(model, inputs, is_leaf=is_norm)
        pairs, kept = _find_pairs(model, flow)
        if not pairs:
            return folded, kept
        for pair in pairs:
            _fold_pair(model, pair)
            folded.append(Step(pair.norm.name, f"into {pair.layer.name}"))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, under every name it has in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _find_pairs(model: nn.Module, flow: DataFlow) -> tuple[list[_Pair], list[Step]]:
    pairs, kept = [], []
    for name, module in model.named_modules():
        if not is_norm(module):
            continue
        try:
            norm = _norm_call(flow, module)
            layer = _feeding_layer(flow, norm)
            _check_only_consumer(flow, layer, norm)
            pairs.append(_Pair(layer, norm))
        except _NotFoldableError as reason:
            kept.append(Step(name, str(reason)))
    return pairs, kept


def _norm_call(flow: DataFlow, norm: nn.Module) -> Call:
    """Return the one call of a foldable norm."""
    if reason := why_not_linear(norm):
        raise _NotFoldableError(reason)
    calls = flow.calls_of(norm)
    if len(calls) != 1:
        raise _NotFoldableError(f"it runs {len(calls)} times in a forward pass, not once")
    if has_pre_hooks(norm):
        raise _NotFoldableError("it has a forward pre-hook")
    tensors = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    for tensor in tensors:
        if tensor is not None and not _only_in(flow, storage_of(tensor), calls[0]):
            raise _NotFoldableError("its weights are also used elsewhere")
    return calls[0]


def _feeding_layer(flow: DataFlow, norm: Call) -> Call:
    """Return the call of the layer whose output is exactly the norm's input."""
    view = norm.inputs[0]
    op = flow.producer(view.storage)
    layer = op.call if op is not None else None
    if op is None or layer is None or len(layer.outputs) != 1 or not _is_product(layer, op):
        origin = "the network's input" if op is None else f"{_where(op)}"
        raise _NotFoldableError(f"its input comes from {origin}, not from a conv or linear layer")
    if not _same_channels(layer, view):
        raise _NotFoldableError(f"its channels are not those of {layer.name}'s output")
    return layer


def _is_product(layer: Call, op: Op) -> bool:
    """Whether a call is no more than x -> W x + b with the module's own weight and bias.

    Decided by the operations that ran, so that subclasses with another padding are taken, and
    those that change the weight on the fly or treat the output further are not.
    """
    weight = getattr(layer.module, "weight", None)
    if not isinstance(layer.module, (*_CONVS, *_TRANSPOSED, nn.Linear)) or weight is None:
        return False
    if op.name not in _PRODUCTS or storage_of(weight) not in {v.storage for v in op.inputs}:
        return False
    if layer.outputs[0].storage not in {v.storage for v in op.outputs}:
        return False
    bias = getattr(layer.module, "bias", None)
    later = layer.ops[layer.ops.index(op) + 1 :]
    adds_bias = bias is not None and storage_of(bias)
    return all(
        o.is_view or (o.name in ("aten.add", "aten.add_") and adds_bias in _memory(o))
        for o in later
    )


def _same_channels(layer: Call, seen: View) -> bool:
    """Whether axis 1 of the norm's input is the channel axis of the layer's output."""
    out = layer.outputs[0]
    if isinstance(layer.module, nn.Linear):
        # (..., C) seen as (N, C). A batch norm takes axis 1 of (N, L, C) for its channels.
        flattened = (math.prod(out.shape[:-1]), out.shape[-1])
        return seen.shape == flattened and seen.stride[1] == out.stride[-1] == 1
    batched = len(out.shape) == layer.module.weight.ndim
    return batched and out == seen


def _check_only_consumer(flow: DataFlow, layer: Call, norm: Call) -> None:
    module, name = layer.module, layer.name
    runs = len(flow.calls_of(module))
    if runs != 1:
        raise _NotFoldableError(f"{name} runs {runs} times in a forward pass")
    if has_hooks(module):
        raise _NotFoldableError(f"{name} has a forward hook")
    for tensor in (module.weight, module.bias):
        if tensor is not None and not _only_in(flow, storage_of(tensor), layer):
            raise _NotFoldableError(f"the weights of {name} are also used elsewhere")
    output = layer.outputs[0].storage
    if flow.is_returned(output):
        raise _NotFoldableError(f"the output of {name} is also an output of the network")
    for op in flow.readers(output):
        if op.call is not layer and op.call is not norm:
            raise _NotFoldableError(f"the output of {name} is also used by {_where(op)}")


def _only_in(flow: DataFlow, storage: int, call: Call) -> bool:
    return all(op.call is call for op in flow.readers(storage))


def _memory(op: Op) -> set[int]:
    return {view.storage for view in op.inputs}


def _where(op: Op) -> str:
    return f"{op.call.name}" if op.call else f"{op.name} in {op.scope or 'the network'}"


def _fold_pair(model: nn.Module, pair: _Pair) -> None:
    layer, norm = pair.layer.module, pair.norm.module
    scale, shift = scale_and_shift(norm)
    weight, bias = layer.weight, layer.bias
    new_bias = shift if bias is None else bias * scale + shift
    layer.weight = _parameter(_scaled(layer, scale), weight)
    layer.bias = _parameter(new_bias, weight if bias is None else bias)
    rest = without_norm(norm)
    if has_hooks(norm):
        # An activation may be shared between norms: their hooks go on a module of their own.
        rest = nn.Sequential(rest)
        give_hooks(norm, rest)
    replace_module(model, norm, rest)


def _scaled(layer: nn.Module, scale: Tensor) -> Tensor:
    weight = layer.weight
    if not isinstance(layer, _TRANSPOSED):
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))  # (C_out, ...)
    # (C_in, C_out / groups, ...): input channels of group g meet the outputs of group g.
    grouped = weight.view(layer.groups, -1, *weight.shape[1:])
    scales = scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
    return (grouped * scales).view_as(weight)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
