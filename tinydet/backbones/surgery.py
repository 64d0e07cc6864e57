"""Ideas tried on any network: another activation, or attention where there was none.

The places are found in the data flow of one forward pass, not by names. A network keeps its weights
and their names; put the changes to a fresh network in the same order to load a checkpoint.
"""

from __future__ import annotations

import copy
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
from tinydet.backbones.blocks import Place, channel_gates, residual_blocks, stage_ends
from tinydet.backbones.calls import ModuleCall, channel_axis, eval_mode, observe_calls
from tinydet.backbones.followed import follow, take_followers
from tinydet.layers import AconA, AconB, AconC, CoordinateAttention, MetaAcon
from tinydet.reparam.dataflow import DataFlow
from tinydet.reparam.module_swap import give_hooks, replace_module
from tinydet.reparam.verify import difference, tensors_in

Make = Callable[[int], nn.Module]
"""From a number of channels to a layer on (B, channels, H, W)."""

ACTIVATIONS = ("acon-a", "acon-b", "acon-c", "meta-acon")
ATTENTIONS = ("coord",)
PLACES = {"se": channel_gates, "block": residual_blocks, "stage": stage_ends}

# Without the gates (sigmoid, hard sigmoid, tanh, softmax): their bounds are what they are for.
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
    """Return a copy of a network with other activations.

    Every activation layer of torch.nn and timm that the example reaches is replaced, also those of
    norm-and-activation layers and of squeeze-and-excitation. Gates (sigmoid, hard sigmoid, tanh,
    softmax) stay. The numbers of channels, and which axis they are, are observed. An activation
    that several places share stays shared, with parameters for each width. Those in code
    (`F.relu`) and those whose channels the data flow does not tell stay, with a warning.

    An ACON starts as near to the activation it replaces as its kind can be: SiLU stays itself,
    ReLU and GELU nearly (see `AconC.like`), hard swish and others become SiLU. ACON has no upper
    bound, but a pretrained network relies on that of ReLU6: it stays behind the ACON. The features
    of tf_efficientnet_lite0 on drawn images are 3 % from the original's then, without the bound
    91 %. Meta-ACON always starts near SiLU: a network pretrained with ReLU has to learn anew.

    Args:
        model: the network, with `features_only` or without; it is not modified.
        kind: "acon-a", "acon-b", "acon-c", "meta-acon" (`tinydet.layers.acon`), or a callable from
            the number of channels to a layer.
        example: an input, or a tuple of positional arguments, on the network's device; for
            instance an image of 64 x 64.
        where: patterns of names, a module's name standing for all in it: "stages.2 stages.3"; all
            if empty.

    Raises:
        ValueError: there is no such kind, nothing to replace, or the network relies on an
            activation that overwrites its input.
    """
    if isinstance(kind, str):
        _check_word("kind", kind, ACTIVATIONS, " and a callable of one's own")
    arguments = example if isinstance(example, tuple) else (example,)
    changed = copy.deepcopy(model)
    flow, calls = observe_calls(changed, arguments)
    found = {m: made for m, made in calls.items() if isinstance(m, _ACTIVATION_CLASSES)}
    names = {made[0].name for made in found.values()}
    in_code = [op for op in flow.ops if op.name in _ACTIVATION_OPS and op.scope not in names]
    what = f"{type(model).__name__}"
    if not found:
        code = f"; {len(in_code)} in its code cannot be replaced" if in_code else ""
        raise ValueError(
            f"{what} runs no activation layer of torch.nn or timm on the example{code}"
        )
    selected = {m: made for m, made in found.items() if _matches(made[0].name, where)}
    if not selected:
        raise ValueError(_nothing_at(where, names, "activation", changed))
    _check_in_place(changed, selected, flow.returned, arguments)
    left = [f"{len(in_code)} in code, e.g. in {in_code[0].scope}"] if in_code and not where else []
    replaced = 0
    for old, made in selected.items():
        try:
            new = _new_activation(old, made, kind, flow)
        except _UnclearError as error:
            left.append(f"{made[0].name} ({error})")
            continue
        new = _placed_like(new, old, changed)
        _replace(changed, old, new)
        replaced += 1
    if not replaced:
        raise ValueError(f"{what}: no activation was replaced: {'; '.join(left[:3])}")
    _check_runs(changed, flow, arguments, f"kind={_name(kind)}")
    if left:
        warnings.warn(f"{what}: activations that stay: {'; '.join(left)}", stacklevel=2)
    return changed


def add_attention(
    model: nn.Module,
    kind: str | Make,
    example: Tensor | tuple[Any, ...],
    place: str,
    where: str = "",
) -> nn.Module:
    """Return a copy of a network with attention.

    After blocks and stages, Coordinate Attention starts as the identity: the network is the same
    function before training. In place of squeeze-and-excitation it is the paper's block with new
    weights, and the network another function. Everything else keeps its weights and names: the new
    layer is a child `attention` of the block or stage, which runs it last.

    The places, all found in the data flow (`tinydet.backbones.blocks`):
        "se": in place of each module that multiplies a map by one factor a channel, computed
            from the map; like squeeze-and-excitation, ECA, effective SE.
        "block": behind each block: modules of a class whose own code adds (if none does:
            concatenates) two tensors computed from its input.
        "stage": behind the outermost module that makes a feature map the network returns.

    Args:
        model: the network, with `features_only` or without; it is not modified.
        kind: "coord" (`tinydet.layers.CoordinateAttention`), or a callable from the number of
            channels to a layer on (B, channels, H, W). A network that works in (B, H, W, C) gets
            it with the axes moved.
        example: an input, or a tuple of positional arguments, on the network's device. Feature
            maps in it must have more than one pixel: 64 x 64 for a stride of 32.
        place: "se", "block" or "stage".
        where: patterns of names, a module's name standing for all in it; all if empty.

    Raises:
        ValueError: there is no such kind or place, or the network has no such place.
    """
    if isinstance(kind, str):
        _check_word("kind", kind, ATTENTIONS, " and a callable of one's own")
    _check_word("place", place, PLACES)
    arguments = example if isinstance(example, tuple) else (example,)
    changed = copy.deepcopy(model)
    flow, calls = observe_calls(changed, arguments)
    places = PLACES[place](flow, calls)
    if not places:
        raise ValueError(
            f"place={place}: the data flow of {type(model).__name__} has no such place"
            f" with one map (B, C, H, W) or (B, H, W, C); the places are {', '.join(PLACES)}"
        )
    selected = [found for found in places if _matches(found.name, where)]
    if not selected:
        raise ValueError(_nothing_at(where, [p.name for p in places], place, changed))
    for found in selected:
        layer = _placed_like(_new_attention(kind, found, place), found.module, changed)
        if place == "se":
            _replace(changed, found.module, layer)
        else:
            follow(found.module, layer, "attention")
    _check_runs(changed, flow, arguments, f"kind={_name(kind)}")
    return changed


class _UnclearError(ValueError):
    """An activation cannot be replaced; the message says why."""


def _new_activation(
    old: nn.Module, made: list[ModuleCall], kind: str | Make, flow: DataFlow
) -> nn.Module:
    axes: dict[int, set[int]] = {}
    for call in made:
        axis = channel_axis(flow, call.inputs[0])
        if axis is None or axis == 0:
            raise _UnclearError("the data flow does not tell its channels")
        axes.setdefault(call.inputs[0].shape[axis], set()).add(axis)
        dims = {len(call.inputs[0].shape) for call in made}
    every = set().union(*axes.values())
    if len(every) > 1:
        raise _UnclearError("it is shared by places with channels in different axes")
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
    if isinstance(kind, str):
        body = CoordinateAttention(found.channels, identity_start=place != "se")
    else:
        body = kind(found.channels)
    return body if found.axis == 1 else ChannelsAlong(body, found.axis)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    take_followers(old, new)  # There may be attention behind it already.
    give_hooks(old, new)
    replace_module(model, old, new)


def _placed_like(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """Return a new layer with the dtype, device and mode of the old one's place."""
    weights = [p for m in (old, model) for p in m.parameters() if p.is_floating_point()]
    return (new.to(weights[0]) if weights else new).train(old.training)


def _check_in_place(
    model: nn.Module, selected: Iterable[nn.Module], expected: Any, arguments: tuple[Any, ...]
) -> None:
    """Refuse a network that reads an activation's input after it was overwritten."""
    in_place = [module for module in selected if getattr(module, "inplace", False)]
    for module in in_place:
        module.inplace = False
    if in_place and difference(expected, _run(model, arguments)).max_rel > 1e-4:
        raise ValueError(
            f"{type(model).__name__} relies on an activation that overwrites its input (inplace); "
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
        raise ValueError(f"{cause}: the network now returns {shapes}, but before {expected}")


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    with eval_mode(model), torch.no_grad():
        return model(*arguments)


def _matches(name: str, where: str) -> bool:
    return not where.split() or any(
        fnmatch.fnmatchcase(name, word) or fnmatch.fnmatchcase(name, f"{word}.*")
        for word in where.split()
    )


def _nothing_at(where: str, names: Iterable[str], what: str, model: nn.Module) -> str:
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


def _check_word(field: str, word: str, known: Iterable[str], more: str = "") -> None:
    if word in known:
        return
    near = difflib.get_close_matches(word, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{field}={word!r}: {hint}The choices are {', '.join(known)}{more}")


def _name(kind: str | Make) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)
