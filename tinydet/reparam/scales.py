"""Norms, and constant factors, taken into the convolutions and linear layers next to them.

A batch norm in inference and a LayerScale are a scale and a shift of each channel. The layers that
make their input take it; if these cannot, the layers that read their output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinydet.reparam.absorb import SUMS, Absorber, ahead, apply_all, behind, check_whole
from tinydet.reparam.channel_map import ChannelMap, NotMovableError
from tinydet.reparam.dataflow import Call, DataFlow
from tinydet.reparam.factors import find_factors, only_scales
from tinydet.reparam.norms import is_norm, scale_and_shift, why_not_linear, without_norm
from tinydet.reparam.replacing import (
    give_hooks,
    has_hooks,
    has_pre_hooks,
    hooks_off,
    replace_module,
)
from tinydet.reparam.report import Step
from tinydet.reparam.rounds import Change, change_in_rounds


def fold_scales(
    model: nn.Module, checks: list[tuple[Any, ...]]
) -> tuple[nn.Module, list[Step], list[Step]]:
    """Fold every norm and every constant factor that a layer can take over.

    Args:
        model: the network in eval mode and float64; changed in place.
        checks: positional arguments for forward passes; the first are for the observed ones.

    Returns:
        The network (another object if a factor was in its own code), what was folded, and every
        norm that stays with its reason.
    """
    kept: dict[str, str] = {}

    def find(model: nn.Module, flow: DataFlow, refused: Mapping[str, str]) -> list[Change]:
        kept.clear()
        return [
            *_norms(model, flow, kept),
            *_scale_modules(flow),
            *find_factors(model, checks[0], flow, refused),
        ]

    model, done, refused = change_in_rounds(model, checks, find)
    norms = [name for name, module in model.named_modules() if is_norm(module)]
    return model, done, [Step(n, refused.get(n) or kept[n]) for n in norms]


def _norms(model: nn.Module, flow: DataFlow, kept: dict[str, str]) -> list[Change]:
    found = []
    for name, module in model.named_modules():
        if is_norm(module):
            try:
                found.append(_change(name, module, _norm_absorbers(flow, module)))
            except NotMovableError as reason:
                kept[name] = str(reason)
    return found


def _scale_modules(flow: DataFlow) -> list[Change]:
    """Find modules that multiply by constants, such as a LayerScale."""
    data = flow.depends_on_input()
    found = []
    scales: dict[nn.Module, list[Call]] = {}
    for call in flow.calls:
        if not is_norm(call.module) and only_scales(call, data):
            scales.setdefault(call.module, []).append(call)
    for module, calls in scales.items():
        try:
            maps = [(call, _map_of_call(call)) for call in calls]
            absorbers = _absorbers(flow, maps, backward_only=True)
        except NotMovableError:
            continue
        found.append(_change(calls[0].name, module, absorbers))
    return found


def _change(name: str, module: nn.Module, absorbers: list[Absorber]) -> Change:
    """Return the change by which layers take over what a module does."""

    def make(model: nn.Module) -> tuple[nn.Module, str]:
        _remove_module(model, module)
        return model, apply_all(absorbers)

    return Change(name, frozenset((module, *(a.call.module for a in absorbers))), make)


def _norm_absorbers(flow: DataFlow, norm: nn.Module) -> list[Absorber]:
    if reason := why_not_linear(norm):
        raise NotMovableError(reason)
    calls = flow.calls_of(norm)
    if not calls:
        raise NotMovableError("it runs 0 times in a forward pass")
    if has_pre_hooks(norm):
        raise NotMovableError("it has a forward pre-hook")
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if tensor is not None and any(op.call not in calls for op in flow.users(tensor)):
            raise NotMovableError("its weights are also used elsewhere")
    maps = []
    for call in calls:
        around = [1] * (len(call.inputs[0].shape) - 2)
        scale, shift = (values.view(1, -1, *around) for values in scale_and_shift(norm))
        maps.append((call, ChannelMap.of(scale, shift)))
    ends = isinstance(without_norm(norm), nn.Identity) and not has_hooks(norm)
    return _absorbers(flow, maps, backward_only=not ends)


def _absorbers(
    flow: DataFlow, maps: list[tuple[Call, ChannelMap]], backward_only: bool
) -> list[Absorber]:
    """Return the layers that take a module's maps in all of its calls."""
    try:
        return check_whole(
            flow,
            [a for call, m in maps for a in behind(flow, call.inputs[0], set(call.ops), m)],
        )
    except NotMovableError as reason:
        if backward_only:
            raise
        try:
            return check_whole(
                flow, [a for call, m in maps for a in ahead(flow, call.outputs[0], m)]
            )
        except NotMovableError as second:
            raise NotMovableError(f"{reason}; {second}") from second


def _map_of_call(call: Call) -> ChannelMap:
    """Return what a module does to its input, the same for inputs of every size that it takes.

    Raises:
        NotMovableError: it does something else to an input of another size.
    """
    shape = list(call.inputs[0].shape)
    asked = _asked(call, shape)
    for axis in range(len(shape)):
        try:
            longer = _asked(call, [n + (a == axis) for a, n in enumerate(shape)])
        except RuntimeError:
            continue  # The axis of its weights, whose length is fixed.
        for values, more in zip(asked, longer, strict=True):
            if not torch.equal(values.narrow(axis, 0, 1).expand_as(more), more):
                raise NotMovableError("its factor depends on the place or the size of its input")
        asked = [values.narrow(axis, 0, 1) for values in asked]
        shape[axis] = 1
    scale, shift = asked
    shifts = any(op.name in SUMS for op in call.ops)
    return ChannelMap.of(scale, shift if shifts else None)


def _asked(call: Call, shape: Sequence[int]) -> list[Tensor]:
    """Return the scale and the shift that a module applies to an input of this shape."""
    with hooks_off(call.module), torch.no_grad():
        zero = call.module(torch.zeros(shape, dtype=torch.float64))
        one = call.module(torch.ones(shape, dtype=torch.float64))
    return [one - zero, zero]


def _remove_module(model: nn.Module, module: nn.Module) -> None:
    rest = without_norm(module) if is_norm(module) else nn.Identity()
    if has_hooks(module):
        # An activation may be shared between norms: their hooks go on a module of their own.
        rest = nn.Sequential(rest)
        give_hooks(module, rest)
    replace_module(model, module, rest)
