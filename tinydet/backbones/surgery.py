"""Replaces activations and adds attention in any network.

The places are found in the data flow of one forward pass, not by name. All other weights keep their
values and names. To load a checkpoint, apply the same changes in the same order to a new network.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import timm.layers
import torch
from timm.layers import activations, activations_me
from timm.models.metaformer import SquaredReLU, StarReLU
from torch import Tensor, nn

from tinydet.backbones.adapters import ByWidth, Capped, ChannelsAlong
from tinydet.backbones.append_layer import append_layer, move_appended_layers
from tinydet.backbones.blocks import Place, channel_gates, residual_blocks, stage_ends
from tinydet.backbones.module_trace import ModuleCall, channel_axis, eval_mode, trace_modules
from tinydet.layers import AconA, AconB, AconC, CoordinateAttention, MetaAcon
from tinydet.reparam.dataflow import DataFlow
from tinydet.reparam.deep_copy import deep_copy
from tinydet.reparam.module_swap import give_hooks, replace_modules
from tinydet.reparam.verify import difference, tensors_in

Make = Callable[[int], nn.Module]
"""From a number of channels to a layer on (B, channels, H, W)."""

ACTIVATIONS = ("acon-a", "acon-b", "acon-c", "meta-acon")
# Each is made for a number of channels; `identity_start`: the function does not change at first.
ATTENTIONS = {"coord": CoordinateAttention}
PLACES = {"se": channel_gates, "block": residual_blocks, "stage": stage_ends}

# Gates (sigmoid, hard sigmoid, tanh, softmax) are not replaced, since they need their bounds.
_ACTIVATION_CLASSES = (
    *(nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus),
    *(activations.Swish, activations.Mish, activations.HardSwish, activations.HardMish),
    *(activations_me.SwishMe, activations_me.MishMe),
    *(activations_me.HardSwishMe, activations_me.HardMishMe),
    *(timm.layers.GELU, timm.layers.GELUTanh, timm.layers.QuickGELU, SquaredReLU, StarReLU),
    *(AconA, AconB, AconC, MetaAcon),
)
_ACTIVATION_OPS = {
    f"aten.{name}{in_place}"
    for name in ("relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardtanh")
    for in_place in ("", "_")
}


def replace_activation(
    model: nn.Module, kind: str | Make, example: Tensor | tuple[Any, ...], where: str = ""
) -> nn.Module:
    """Return a copy of a network with its activations replaced.

    Every activation layer of torch.nn and timm that runs on the example is replaced, including
    those of norm-and-activation layers and squeeze-and-excitation. Gates (sigmoid, hard sigmoid,
    tanh, softmax) stay. The number of channels and their axis are read from the data flow. An
    activation module shared by several places stays shared, with parameters for each width.
    Functional activations (`F.relu`) and those whose channel axis is unknown stay, with a warning.

    An ACON starts as close as it can to the activation it replaces: SiLU exactly, ReLU and GELU
    nearly (see `AconC.like`); hard swish and others become SiLU. The upper bound of ReLU6, on which
    pretrained networks rely, is kept behind the ACON: the features of tf_efficientnet_lite0 on
    random images then change by 3 %, without the bound by 91 %. Meta-ACON always starts near SiLU,
    so that a network pretrained with ReLU loses most of what it has learned.

    Args:
        model: the network, with or without `features_only`; not modified.
        kind: "acon-a", "acon-b", "acon-c", "meta-acon" (`tinydet.layers.acon`), or a callable from
            the number of channels to a layer.
        example: an input, or a tuple of positional arguments, on the network's device; for
            instance an image of 64 x 64.
        where: patterns of module names separated by spaces, such as "stages.2 stages.3"; a module
            includes everything inside it. Empty selects all.

    Raises:
        ValueError: the kind is unknown, there is nothing to replace, or the network relies on an
            in-place activation overwriting its input.
    """
    if isinstance(kind, str):
        _check_choice("kind", kind, ACTIVATIONS, " or a callable")
    arguments = example if isinstance(example, tuple) else (example,)
    changed = deep_copy(model)
    flow, calls = trace_modules(changed, arguments)
    found = {m: made for m, made in calls.items() if isinstance(m, _ACTIVATION_CLASSES)}
    names = {made[0].name for made in found.values()}
    functional = [op for op in flow.ops if op.name in _ACTIVATION_OPS and op.scope not in names]
    what = f"{type(model).__name__}"
    if not found:
        code = f"; {len(functional)} functional ones cannot be replaced" if functional else ""
        raise ValueError(
            f"{what} runs no activation layer of torch.nn or timm on the example{code}"
        )
    selected = {m: made for m, made in found.items() if _matches(made[0].name, where)}
    if not selected:
        raise ValueError(_no_match(where, names, "activation", changed))
    _check_in_place(changed, selected, flow.returned, arguments)
    kept = []
    if functional and not where:
        kept.append(f"{len(functional)} functional, e.g. in {functional[0].scope}")
    replaced = 0
    for old, made in selected.items():
        try:
            new = _new_activation(old, made, kind, flow)
        except _UnknownChannelsError as error:
            kept.append(f"{made[0].name} ({error})")
            continue
        new = _to_place_of(new, old, changed)
        _replace(changed, old, new)
        replaced += 1
    if not replaced:
        raise ValueError(f"{what}: no activation was replaced: {'; '.join(kept[:3])}")
    _check_runs(changed, flow, arguments, f"kind={_name(kind)}")
    if kept:
        warnings.warn(f"{what}: activations not replaced: {'; '.join(kept)}", stacklevel=2)
    return changed


def add_attention(
    model: nn.Module,
    kind: str | Make,
    example: Tensor | tuple[Any, ...],
    place: str,
    where: str = "",
) -> nn.Module:
    """Return a copy of a network with attention layers.

    After blocks and stages, Coordinate Attention starts as the identity, so that the network
    computes the same function before training. In place of squeeze-and-excitation it is the paper's
    block with new weights. All other weights keep their values and names: the new layer is a child
    `attention` of the block or stage and runs last in it.

    The places are found in the data flow (`tinydet.backbones.blocks`):
        "se": in place of each module that multiplies a map by one factor for each channel computed
            from the map, such as squeeze-and-excitation, ECA or effective SE.
        "block": after each block, i.e. modules of a class whose own code adds (if there is none:
            concatenates) two tensors computed from its input.
        "stage": after the outermost module that computes a feature map the network returns.

    Args:
        model: the network, with or without `features_only`; not modified.
        kind: "coord" (`tinydet.layers.CoordinateAttention`), or a callable from the number of
            channels to a layer on (B, channels, H, W). In a network with (B, H, W, C) maps it is
            wrapped to move the axes.
        example: an input, or a tuple of positional arguments, on the network's device. All feature
            maps must have more than one pixel: 64 x 64 for a stride of 32.
        place: "se", "block" or "stage".
        where: patterns of module names separated by spaces; a module includes everything inside
            it. Empty selects all.

    Raises:
        ValueError: the kind or place is unknown, or the network has no such place.
    """
    if isinstance(kind, str):
        _check_choice("kind", kind, tuple(ATTENTIONS), " or a callable")
    _check_choice("place", place, PLACES)
    arguments = example if isinstance(example, tuple) else (example,)
    changed = deep_copy(model)
    flow, calls = trace_modules(changed, arguments)
    places = PLACES[place](flow, calls)
    if not places:
        raise ValueError(
            f"place={place}: {type(model).__name__} has no such place with one map (B, C, H, W) or "
            f"(B, H, W, C); the places are {', '.join(PLACES)}"
        )
    selected = [found for found in places if _matches(found.name, where)]
    if not selected:
        raise ValueError(_no_match(where, [p.name for p in places], place, changed))
    for found in selected:
        layer = _to_place_of(_new_attention(kind, found, place), found.module, changed)
        if place == "se":
            _replace(changed, found.module, layer)
        else:
            append_layer(found.module, layer, "attention")
    _check_runs(changed, flow, arguments, f"kind={_name(kind)}")
    return changed


class _UnknownChannelsError(ValueError):
    """The channel axis of an activation is unknown; the message says why."""


def _new_activation(
    old: nn.Module, made: list[ModuleCall], kind: str | Make, flow: DataFlow
) -> nn.Module:
    axes: dict[int, set[int]] = {}
    for call in made:
        axis = channel_axis(flow, call.inputs[0])
        if axis is None or axis == 0:
            raise _UnknownChannelsError("its channel axis is unknown")
        axes.setdefault(call.inputs[0].shape[axis], set()).add(axis)
        dims = {len(call.inputs[0].shape) for call in made}
    every = set().union(*axes.values())
    if len(every) > 1:
        raise _UnknownChannelsError("it is shared by places with different channel axes")
    axis = every.pop()
    bodies = {width: _activation(old, kind, width) for width in axes}
    if axis != 1 or not dims <= {4}:
        bodies = {width: ChannelsAlong(body, axis) for width, body in bodies.items()}
    return next(iter(bodies.values())) if len(bodies) == 1 else ByWidth(bodies, axis)


def _activation(old: nn.Module, kind: str | Make, channels: int) -> nn.Module:
    if not isinstance(kind, str):
        return kind(channels)
    made = _acon(old, kind, channels)
    return Capped(made, old.max_val) if isinstance(old, nn.ReLU6) else made


def _acon(old: nn.Module, kind: str, channels: int) -> nn.Module:
    near = AconC.like(old, channels)
    if kind == "acon-c":
        return near
    if kind == "meta-acon":
        return MetaAcon(channels)
    made = AconA(channels) if kind == "acon-a" else AconB(channels)
    with torch.no_grad():
        made.beta.copy_(near.beta)
        if isinstance(made, AconB):
            made.p.copy_(near.p2)
    return made


def _new_attention(kind: str | Make, found: Place, place: str) -> nn.Module:
    body: nn.Module
    if isinstance(kind, str):
        body = ATTENTIONS[kind](found.channels, identity_start=place != "se")
    else:
        body = kind(found.channels)
    return body if found.axis == 1 else ChannelsAlong(body, found.axis)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    move_appended_layers(old, new)  # Such as attention added before.
    give_hooks(old, new)
    replace_modules(model, {old: new})


def _to_place_of(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """Return the new layer with the dtype, device and mode of the old one."""
    weights = [p for m in (old, model) for p in m.parameters() if p.is_floating_point()]
    return (new.to(weights[0]) if weights else new).train(old.training)


def _check_in_place(
    model: nn.Module, selected: Iterable[nn.Module], expected: Any, arguments: tuple[Any, ...]
) -> None:
    """Make activations out-of-place; raise if the network relies on their overwriting the input."""
    in_place = [module for module in selected if getattr(module, "inplace", False)]
    for module in in_place:
        setattr(module, "inplace", False)  # noqa: B010 - a plain attribute of some activations
    if in_place and difference(expected, _run(model, arguments)).max_rel > 1e-4:
        raise ValueError(
            f"{type(model).__name__} relies on an in-place activation overwriting its input; "
            "change its code, or select others with where="
        )


def _check_runs(model: nn.Module, flow: DataFlow, arguments: tuple[Any, ...], cause: str) -> None:
    expected = [tuple(t.shape) for t in tensors_in(flow.returned)]
    try:
        shapes = [tuple(t.shape) for t in tensors_in(_run(model, arguments))]
    except (RuntimeError, ValueError, TypeError) as error:
        problem = str(error).split("\n")[0]
        raise ValueError(f"{cause}: the changed network fails on the example: {problem}") from error
    if shapes != expected:
        raise ValueError(f"{cause}: the network now returns {shapes}, before {expected}")


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    with eval_mode(model), torch.no_grad():
        return model(*arguments)


def _matches(name: str, where: str) -> bool:
    return not where.split() or any(
        fnmatch.fnmatchcase(name, word) or fnmatch.fnmatchcase(name, f"{word}.*")
        for word in where.split()
    )


def _no_match(where: str, names: Iterable[str], what: str, model: nn.Module) -> str:
    names = list(names)
    known = [name for name, _ in model.named_modules() if name]
    hint = ""
    for word in where.split():
        if not any(_matches(name, word) for name in known):
            near = difflib.get_close_matches(word, known, 1)
            hint = f"; did you mean {near[0]} for {word}?" if near else hint
    return (
        f"where={where!r} selects none of the {len(names)} places ({what}){hint}; the first are "
        f"{', '.join(names[:3])}"
    )


def _check_choice(field: str, word: str, known: Iterable[str], more: str = "") -> None:
    if word in known:
        return
    near = difflib.get_close_matches(word, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{field}={word!r}: {hint}The choices are {', '.join(known)}{more}")


def _name(kind: str | Make) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)
