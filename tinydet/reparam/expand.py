"""Expand a network: add training-time branches to its convs without changing its function.

The inverse of `tinydet.reparam.fold`: an expanded network that was trained folds into the convs,
shapes and cost of the original.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, cast

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from tinydet.reparam.branches import BLOCKS, Block, ChannelScale
from tinydet.reparam.deep_copy import deep_copy
from tinydet.reparam.exact import one_thread
from tinydet.reparam.like_original import memory_format_of
from tinydet.reparam.module_class import class_of, set_class
from tinydet.reparam.online import BranchKernels, check_kernel, make_linear
from tinydet.reparam.same_padding import SamePad2d

Where = Callable[[str, nn.Conv2d], bool]


class ExpandedConv2d(nn.Conv2d):
    """A conv with parallel branches; its own weight and bias keep their names.

    Attributes:
        branches: each takes the conv's input; its output is added to the conv's.
    """

    branches: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the conv and its branches."""
        y = super().forward(x)
        for branch in self.branches:
            y = y + branch(x)
        return y


class ExpandedConv2dSame(ExpandedConv2d):
    """The same for a conv that may pad more at the end than at the start.

    That is timm's Conv2dSame, and `padding="same"` with an even kernel. Its `padding` is 0.

    Attributes:
        pad: pads the input once, for the conv and the branches.
    """

    pad: SamePad2d

    def forward(self, x: Tensor) -> Tensor:
        """Pad, and return the sum of the conv and its branches."""
        return super().forward(self.pad(x))


@torch.inference_mode(False)
@one_thread()
def expand(
    model: nn.Module,
    block: str | Block,
    where: str | Where = "",
    online: bool = False,
    scale: float = 0.0,
) -> nn.Module:
    """Return a copy of a network whose convs have additional parallel branches.

    The copy computes the same function in eval and in train mode, because each new branch ends in a
    norm whose weight and bias are zero. That norm receives gradients in the first step, the layers
    before it from the second step on. The new weights are drawn from torch's global generator.

    By default the branches run beside the conv, and the copy keeps the weights of the original
    under the same names. Only `nn.Conv2d` and timm's Conv2dSame are expanded, no subclasses, no
    other padding than zeros, and no conv whose weight is computed from other tensors (weight norm,
    pruning). In training mode a branch needs more than one value per channel, like any batch norm:
    a conv after global pooling needs more than one image per batch.

    With `online`, the kernels of the branches are added to the conv's weight in each forward pass
    (OREPA, arXiv 2204.00826), so that a step takes little longer than without branches. It needs
    linear branches: norms in them become learned scales of each channel, the last ones zero at the
    start, and biases are left out. The weight is parametrized with `torch.nn.utils.parametrize`,
    under whose names the state dict has it (`conv.parametrizations.weight.original`); any padding
    mode is taken, and weights that are parametrized already.

    Branches have the conv's dtype, device, mode and memory format. They learn, also those of a
    frozen conv, which stays frozen itself. Branches have a shift, so after folding a conv without
    bias that no norm follows has a bias. An expanded network can be expanded again, also the same
    conv, and so can a folded one.

    Args:
        model: the network; it is not modified.
        block: the kind of branches, "repvgg", "qarepvgg", "acnet", "dbb", "orepa", "mobileone" or
            "large-kernel", or a callable from the conv to a list of modules without their last
            norm, each affine in eval mode; `tinydet.reparam.branches` has helpers and an example.
        where: which convs to expand; the empty string means all. A function of the conv's
            qualified name and the conv, or words: "3x3" is a kernel size, "depthwise" (as many
            groups as input channels) and "dense" (one group) are kinds, any other word is a name
            pattern, and a module's name covers everything in it. Words of one sort are
            alternatives, and every sort has to match: "3x3 5x5 depthwise stages.2 stages.3".
        online: whether the branches are summed up in the weight instead of run beside the conv.
        scale: weight of the branches' last norms or scales at the start. With another one than 0
            all layers of a branch learn from the first step on. Beside the conv it changes the
            function; with `online` the conv's own weight becomes what the branches leave.

    Raises:
        ValueError: there is no such block, no conv is selected, none of the selected can have this
            block, a branch's output has another shape than the conv's, or with `online` it is no
            kernel on the conv's taps. With `online` and a `scale`, other modules share the weight,
            or it is parametrized in a way that cannot be inverted, as by spectral norm.
    """
    grow, kind = _find_block(block)
    expanded = deep_copy(model)
    convs = _convs(expanded, online)
    selects = _parse(where) if isinstance(where, str) else where
    selected = {
        conv: names for conv, names in convs.items() if any(selects(name, conv) for name in names)
    }
    if not selected:
        raise ValueError(_nothing_selected(expanded, convs, where, online))
    if online and scale:
        _refuse_shared_weights(expanded, selected)
    grown = False
    for conv, names in selected.items():
        grown |= _grow(
            conv, grow, online, scale, f"block={kind}: a branch of {names[0] or 'the model'}"
        )
    if not grown:
        name, conv = next((names[0], conv) for conv, names in selected.items())
        raise ValueError(
            f"block={kind}: grows on none of the {len(selected)} convs that where={where!r} selects"
            f", e.g. {name or 'the model'} ({_describe(conv)})"
        )
    return expanded


def _refuse_shared_weights(model: nn.Module, convs: dict[nn.Conv2d, list[str]]) -> None:
    users = Counter(p for module in model.modules() for p in module._parameters.values())
    for conv, names in convs.items():
        if any(users[p] > 1 for name, p in conv.named_parameters() if "weight" in name):
            raise ValueError(
                f"scale: the weight of {names[0] or 'the model'} is shared with other modules, "
                "which would change; use scale=0, or leave it out with where"
            )


def expanded_names(model: nn.Module) -> list[str]:
    """Return the qualified names of the convs that have branches."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, ExpandedConv2d) or _kernels_in(module)
    ]


def _find_block(block: str | Block) -> tuple[Block, str]:
    if not isinstance(block, str):
        return block, getattr(block, "__name__", type(block).__name__)
    if block not in BLOCKS:
        near = difflib.get_close_matches(block, BLOCKS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"block={block!r}: no such block; {hint}use one of {', '.join(BLOCKS)}, or a callable"
        )
    return BLOCKS[block], block


def _kernels_in(module: nn.Module) -> list[BranchKernels]:
    """Return the branches inside a module's weight."""
    if not parametrize.is_parametrized(module, "weight"):
        return []
    steps = cast(Any, module.parametrizations)["weight"]
    return [step for step in steps if isinstance(step, BranchKernels)]


def _convs(model: nn.Module, online: bool) -> dict[nn.Conv2d, list[str]]:
    """Return the convs that can be expanded and all names of each, except those in branches."""
    found: dict[nn.Conv2d, list[str]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ExpandedConv2d):
            inside.update(module.branches.modules())
        for kernels in _kernels_in(module):
            inside.update(kernels.modules())
        if module not in inside and not _obstacle(module, online):
            found.setdefault(cast(nn.Conv2d, module), []).append(name)
    return found


def _obstacle(module: nn.Module, online: bool) -> str:
    """Return why a module cannot have branches; empty if it can."""
    kind = class_of(module)
    if not (kind in (nn.Conv2d, Conv2dSame) or isinstance(module, ExpandedConv2d)):
        return f"a {kind.__name__}"
    if module.padding_mode != "zeros" and not online:
        return f"padded with {module.padding_mode} values"
    # By hooks (weight norm, pruning) or by assignment to the object.
    parametrized = parametrize.is_parametrized(module, "weight")
    plain = "weight" in module._parameters or (parametrized and (online or _kernels_in(module)))
    if not plain or "forward" in vars(module):
        return "a conv with a computed weight or a replaced forward"
    return ""


def _parse(where: str) -> Where:
    """Return the predicate for a string of words; see `expand`."""
    words = where.split()
    sizes = {tuple(map(int, w.split("x"))) for w in words if re.fullmatch(r"\d+x\d+", w)}
    kinds = {w for w in words if w in ("depthwise", "dense")}
    patterns = [w for w in words if w not in kinds and not re.fullmatch(r"\d+x\d+", w)]

    def selects(name: str, conv: nn.Conv2d) -> bool:
        return (
            (not sizes or conv.kernel_size in sizes)
            and (not kinds or _kind(conv) in kinds)
            and (not patterns or any(matches(name, pattern) for pattern in patterns))
        )

    return selects


def _kind(conv: nn.Conv2d) -> str:
    if conv.groups == 1:
        return "dense"
    return "depthwise" if conv.groups == conv.in_channels else f"{conv.groups} groups"


def matches(name: str, pattern: str) -> bool:
    """Return whether a module's name, or that of a module around it, has a pattern."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _nothing_selected(
    model: nn.Module, convs: dict[nn.Conv2d, list[str]], where: str | Where, online: bool
) -> str:
    words = where.split() if isinstance(where, str) else []
    others = (
        f"; {name or 'the model'} is {_obstacle(module, online)}"
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, torch.jit.ScriptModule))
        and (
            not convs or (_obstacle(module, online) and any(matches(name, word) for word in words))
        )
    )
    other = next(others, "")
    if not convs:
        return f"{type(model).__name__} has no zero-padded nn.Conv2d to add branches to{other}"
    modules = [name for name, _ in model.named_modules() if name]
    hint = other
    for word in words:
        if not any(matches(name, word) for name in modules):
            near = difflib.get_close_matches(word, ["depthwise", "dense", *modules], 1)
            hint = f"; did you mean {near[0]} for {word}?" if near else hint
    examples = [f"{names[0]} ({_describe(conv)})" for conv, names in islice(convs.items(), 3)]
    return (
        f"where={where!r} selects none of the {len(convs)} convs{hint}; the first are "
        f"{', '.join(examples)}"
    )


def _describe(conv: nn.Conv2d) -> str:
    return f"{conv.kernel_size[0]}x{conv.kernel_size[1]} {_kind(conv)}"


def _grow(conv: nn.Conv2d, grow: Block, online: bool, scale: float, where: str) -> bool:
    """Add branches to a conv in place, and return whether there are any for it."""
    parametrized = parametrize.is_parametrized(conv)
    if parametrized:
        set_class(conv, class_of(conv))  # Copies share a generated class: it gets its own.
        cast(nn.Module, conv.parametrizations).eval()  # Spectral norm takes a step in training.
    # The branches see the padded input: of `ExpandedConv2dSame.pad`, or any in the weight.
    padded = SamePad2d.needed_by(conv) or conv.padding_mode != "zeros"
    like = _unpadded(conv) if padded else conv
    branches = [_finished(branch, like, online, scale, where) for branch in grow(like)]
    if branches and online:
        weight = conv.weight.detach().clone()
        parametrize.register_parametrization(conv, "weight", BranchKernels(like, branches))
        if parametrized and scale:
            conv.weight = weight  # torch does so for the first parametrization alone.
        if scale and not weight.is_meta:
            _check_unchanged(conv.weight, weight, where)
        parametrized = True
    elif branches:
        _attach(conv, branches)
    if parametrized:
        cast(nn.Module, conv.parametrizations).train(conv.training)
    return bool(branches)


def _check_unchanged(found: Tensor, expected: Tensor, where: str) -> None:
    apart = (found.detach() - expected).abs().max()
    if apart > math.sqrt(torch.finfo(expected.dtype).eps) * expected.abs().max():
        raise ValueError(
            f"{where}: its scale would change the conv, whose weight is computed by a "
            "parametrization that cannot be inverted; use scale=0"
        )


def _unpadded(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a plain conv without padding that has another one's weight."""
    plain = nn.Conv2d.__new__(nn.Conv2d)
    weight = nn.Parameter(conv.weight.detach(), requires_grad=False)
    vars(plain).update(vars(conv), _parameters={**conv._parameters, "weight": weight})
    plain.padding, plain.padding_mode = (0, 0), "zeros"
    plain._reversed_padding_repeated_twice = [0] * 4
    return plain


def _finished(
    branch: nn.Module, conv: nn.Conv2d, online: bool, scale: float, where: str
) -> nn.Sequential:
    """Append the norm or scale that a branch starts with, and check its output."""
    layers = list(branch) if isinstance(branch, nn.Sequential) else [branch]
    if not isinstance(layers[-1], ChannelScale):
        last = ChannelScale if online else nn.BatchNorm2d
        layers.append(last(conv.out_channels))
    finished = nn.Sequential(*layers)
    # The bias of a norm is zero already.
    nn.init.constant_(cast(Tensor, layers[-1].weight), scale)
    if online:
        make_linear(finished)
    finished.to(conv.weight).to(memory_format=memory_format_of(conv.weight))
    _check_shape(finished, conv, where)
    if online:
        check_kernel(finished, conv, where)
    return finished.train(conv.training)


def _check_shape(branch: nn.Module, conv: nn.Conv2d, where: str) -> None:
    sides = [
        dilation * (kernel - 1) + 1 + 2 * stride
        for kernel, dilation, stride in zip(
            conv.kernel_size, conv.dilation, conv.stride, strict=True
        )
    ]
    x = conv.weight.new_zeros(1, conv.in_channels, *sides)
    with torch.no_grad():
        expected = tuple(nn.Conv2d.forward(conv, x).shape)
        try:
            shape = tuple(branch.eval()(x).shape)
        except (RuntimeError, ValueError) as error:
            problem = str(error).split("\n")[0]
            raise ValueError(f"{where} fails on an input {tuple(x.shape)}: {problem}") from error
    if shape != expected:
        raise ValueError(f"{where} returns {shape} for {tuple(x.shape)}, but the conv {expected}")


def _attach(conv: nn.Conv2d, branches: Sequence[nn.Module]) -> None:
    if not isinstance(conv, ExpandedConv2d):
        # Changing the class instead of the module keeps every name, hook and reference valid.
        if SamePad2d.needed_by(conv):
            conv.pad = SamePad2d(conv).train(conv.training)
            conv.padding = (0, 0)
            set_class(conv, ExpandedConv2dSame)
        else:
            set_class(conv, ExpandedConv2d)
        conv.branches = nn.ModuleList().train(conv.training)
    cast(ExpandedConv2d, conv).branches.extend(branches)
