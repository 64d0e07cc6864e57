"""Fold norms and constant factors into the convolutions and linear layers next to them.

In inference, a batch norm or a LayerScale is a scale and a shift of each channel. It is fused into
the layers that produce its input or, if that is impossible, into those that read its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tinydet.reparam.apply_changes import Change, Network, apply_changes
from tinydet.reparam.channel_affine import ChannelAffine, NotFusableError
from tinydet.reparam.channelwise_ops import SUMS
from tinydet.reparam.dataflow import Call, DataFlow
from tinydet.reparam.factors import find_factors, only_scales, scales
from tinydet.reparam.fuse_affine import (
    Fusion,
    apply_fusions,
    consumer_fusions,
    one_per_layer,
    producer_fusions,
)
from tinydet.reparam.module_swap import (
    Replacements,
    give_hooks,
    has_hooks,
    hooks_disabled,
)
from tinydet.reparam.norms import is_norm, scale_and_shift, why_not_linear, without_norm
from tinydet.reparam.report import Step


def fold_scales(network: Network) -> tuple[list[Step], list[Step]]:
    """Fold every norm and every constant factor that can be fused into a layer.

    Args:
        network: changed in place.

    Returns:
        What was folded, and every norm and factor that remains with the reason.
    """
    kept: dict[str, str] = {}
    factors: dict[str, str] = {}
    untraceable: dict[nn.Module, str] = {}

    def find(model: nn.Module, flow: DataFlow, refused: Mapping[str, str]) -> list[Change]:
        kept.clear()
        factors.clear()
        factors.update(scales(flow))
        return [
            *_norms(model, flow, kept),
            *_scale_modules(flow, kept),
            *find_factors(model, network.examples[0], flow, refused, kept, untraceable),
        ]

    done, refused = apply_changes(network, find)
    norms = {name: name for name, module in network.model.named_modules() if is_norm(module)}
    left = [Step(n, refused.get(by) or kept[by]) for n, by in (norms | factors).items()]
    return done, left


def _norms(model: nn.Module, flow: DataFlow, kept: dict[str, str]) -> list[Change]:
    found = []
    for name, module in model.named_modules():
        if is_norm(module):
            try:
                found.append(_change(name, module, _norm_fusions(flow, module)))
            except NotFusableError as reason:
                kept[name] = str(reason)
    return found


def _scale_modules(flow: DataFlow, kept: dict[str, str]) -> list[Change]:
    """Find modules that multiply by constants, such as a LayerScale."""
    data = flow.depends_on_input()
    found = []
    calls_of: dict[nn.Module, list[Call]] = {}
    for call in flow.calls:
        if not is_norm(call.module) and only_scales(call, data):
            calls_of.setdefault(call.module, []).append(call)
    for module, calls in calls_of.items():
        try:
            maps = [(call, _affine_of_call(call)) for call in calls]
            fusions = _fusions(flow, maps, backward_only=True)
        except NotFusableError as reason:
            kept[calls[0].name] = str(reason)
            continue
        found.append(_change(calls[0].name, module, fusions))
    return found


def _change(name: str, module: nn.Module, fusions: list[Fusion]) -> Change:
    """Return the change that removes a module and fuses its effect into layers."""

    def make() -> tuple[str, Replacements]:
        return apply_fusions(fusions), {module: _rest_of(module)}

    return Change(name, frozenset((module, *(a.call.module for a in fusions))), make)


def _norm_fusions(flow: DataFlow, norm: nn.Module) -> list[Fusion]:
    if reason := why_not_linear(norm):
        raise NotFusableError(reason)
    calls = flow.calls_of(norm)
    if not calls:
        raise NotFusableError("it runs 0 times in a forward pass")
    if norm._forward_pre_hooks:
        raise NotFusableError("it has a forward pre-hook")
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(norm, name)
        if tensor is not None and any(op.call not in calls for op in flow.users(tensor)):
            raise NotFusableError("its weights are also used elsewhere")
    maps = []
    for call in calls:
        axes = len(call.inputs[0].shape)
        if isinstance(norm, nn.modules.instancenorm._InstanceNorm) and (
            axes == norm._get_no_batch_dim()
        ):
            raise NotFusableError("its input has no batch axis")
        around = [1] * (axes - 2)
        scale, shift = (values.view(1, -1, *around) for values in scale_and_shift(norm))
        maps.append((call, ChannelAffine.of(scale, shift)))
    ends = isinstance(without_norm(norm), nn.Identity) and not has_hooks(norm)
    return _fusions(flow, maps, backward_only=not ends)


def _fusions(
    flow: DataFlow, maps: list[tuple[Call, ChannelAffine]], backward_only: bool
) -> list[Fusion]:
    """Return the fusions of what a module does in each of its calls."""
    try:
        return one_per_layer(
            flow,
            [
                a
                for call, m in maps
                for a in producer_fusions(flow, call.inputs[0], set(call.ops), m)
            ],
        )
    except NotFusableError as reason:
        if backward_only:
            raise
        try:
            return one_per_layer(
                flow, [a for call, m in maps for a in consumer_fusions(flow, call.outputs[0], m)]
            )
        except NotFusableError as second:
            raise NotFusableError(f"{reason}; {second}") from second


def _affine_of_call(call: Call) -> ChannelAffine:
    """Return the scale and shift that a module applies to inputs of any size.

    Raises:
        NotFusableError: they depend on the size or the position.
    """
    shape = list(call.inputs[0].shape)
    maps = _scale_and_shift_at(call, shape)
    for axis in range(len(shape)):
        try:
            longer = _scale_and_shift_at(call, [n + (a == axis) for a, n in enumerate(shape)])
        except Exception:
            # The axis of its weights, whose length is fixed; its code may raise anything.
            continue
        for values, more in zip(maps, longer, strict=True):
            if not torch.equal(values.narrow(axis, 0, 1).expand_as(more), more):
                raise NotFusableError("its factor depends on the place or the size of its input")
        maps = [values.narrow(axis, 0, 1) for values in maps]
        shape[axis] = 1
    scale, shift = maps
    shifts = any(op.name in SUMS for op in call.ops)
    return ChannelAffine.of(scale, shift if shifts else None)


def _scale_and_shift_at(call: Call, shape: Sequence[int]) -> list[Tensor]:
    """Return the scale and the shift that a module applies to an input of this shape."""
    with hooks_disabled(call.module), torch.no_grad():
        zero = call.module(torch.zeros(shape, dtype=torch.float64))
        one = call.module(torch.ones(shape, dtype=torch.float64))
    return [one - zero, zero]


def _rest_of(module: nn.Module) -> nn.Module:
    """Return what remains of a module without its scale and shift."""
    rest = without_norm(module) if is_norm(module) else nn.Identity()
    if has_hooks(module):
        # The norm's activation may be shared with others: the hooks go on a wrapper of it.
        rest = nn.Sequential(rest)
        give_hooks(module, rest)
    return rest
