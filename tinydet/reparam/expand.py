"""Expand a network: add training-time branches to its convs without changing its function.

The inverse of `tinydet.reparam.fold`: an expanded network that was trained folds into the convs,
shapes and cost of the original.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable
from itertools import islice
from typing import cast

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from tinydet.reparam.bake import copy_network
from tinydet.reparam.branches import BLOCKS, Block
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
    """The same for timm's Conv2dSame, whose padding depends on the input's size.

    Attributes:
        pad: pads the input once, for the conv and the branches.
    """

    pad: SamePad2d

    def forward(self, x: Tensor) -> Tensor:
        """Pad, and return the sum of the conv and its branches."""
        return super().forward(self.pad(x))


_EXPANDED: dict[type[nn.Module], type[ExpandedConv2d]] = {
    nn.Conv2d: ExpandedConv2d,
    Conv2dSame: ExpandedConv2dSame,
}


def expand(model: nn.Module, block: str | Block, where: str | Where = "") -> nn.Module:
    """Return a copy of a network whose convs have additional parallel branches.

    The copy keeps the weights of the original under the same names. It computes the same function
    in eval and in train mode, because each new branch ends in a norm whose weight and bias are
    zero. That norm receives gradients in the first step, the layers before it from the second step
    on. The new weights are drawn from torch's global generator.

    Only `nn.Conv2d` and timm's Conv2dSame are expanded, no subclasses and no other padding than
    zeros. In training mode a branch needs more than one value per channel, like any batch norm: a
    conv after global pooling needs more than one image per batch.

    Branches have a shift, so after folding a conv without bias that no norm follows has a bias. An
    expanded network can be expanded again, also the same conv.

    Args:
        model: the network; it is not modified.
        block: the kind of branches, "repvgg", "acnet", "dbb", "mobileone" or "large-kernel", or a
            callable from the conv to a list of modules without their last norm, each affine in
            eval mode; `tinydet.reparam.branches` has helpers and an example.
        where: which convs to expand; the empty string means all. A function of the conv's
            qualified name and the conv, or words: "3x3" is a kernel size, "depthwise" (as many
            groups as input channels) and "dense" (one group) are kinds, any other word is a name
            pattern, and a module's name covers everything in it. Words of one sort are
            alternatives, and every sort has to match: "3x3 5x5 depthwise stages.2 stages.3".

    Raises:
        ValueError: there is no such block, no conv is selected, none of the selected can have this
            block, or a branch's output has another shape than the conv's.
    """
    grow, kind = _find_block(block)
    expanded = copy_network(model)
    convs = _convs(expanded)
    selects = _parse(where) if isinstance(where, str) else where
    selected = {
        conv: names for conv, names in convs.items() if any(selects(name, conv) for name in names)
    }
    if not selected:
        raise ValueError(_nothing_selected(expanded, convs, where))
    grown = False
    for conv, names in selected.items():
        branches = [_finished(branch, conv, names[0], kind) for branch in grow(conv)]
        if branches:
            grown = True
            _attach(conv, branches)
    if not grown:
        name, conv = next((names[0], conv) for conv, names in selected.items())
        raise ValueError(
            f"block={kind}: grows on none of the {len(selected)} convs that where={where!r} selects"
            f", e.g. {name or 'the model'} ({_describe(conv)})"
        )
    return expanded


def expanded_names(model: nn.Module) -> list[str]:
    """Return the qualified names of the convs that have branches."""
    return [name for name, module in model.named_modules() if isinstance(module, ExpandedConv2d)]


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


def _convs(model: nn.Module) -> dict[nn.Conv2d, list[str]]:
    """Return the convs that can be expanded and all names of each, except those in branches."""
    found: dict[nn.Conv2d, list[str]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ExpandedConv2d):
            inside.update(module.branches.modules())
        plain = type(module) in _EXPANDED or isinstance(module, ExpandedConv2d)
        if plain and module not in inside and module.padding_mode == "zeros":
            found.setdefault(module, []).append(name)
    return found


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
            and (not patterns or any(_matches(name, pattern) for pattern in patterns))
        )

    return selects


def _kind(conv: nn.Conv2d) -> str:
    if conv.groups == 1:
        return "dense"
    return "depthwise" if conv.groups == conv.in_channels else f"{conv.groups} groups"


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _nothing_selected(
    model: nn.Module, convs: dict[nn.Conv2d, list[str]], where: str | Where
) -> str:
    if not convs:
        return f"{type(model).__name__} has no zero-padded nn.Conv2d to add branches to"
    modules = [name for name, _ in model.named_modules() if name]
    hint = ""
    for word in where.split() if isinstance(where, str) else ():
        if not any(_matches(name, word) for name in modules):
            near = difflib.get_close_matches(word, ["depthwise", "dense", *modules], 1)
            hint = f"; did you mean {near[0]} for {word}?" if near else hint
    examples = [f"{names[0]} ({_describe(conv)})" for conv, names in islice(convs.items(), 3)]
    return (
        f"where={where!r} selects none of the {len(convs)} convs{hint}; the first are "
        f"{', '.join(examples)}"
    )


def _describe(conv: nn.Conv2d) -> str:
    return f"{conv.kernel_size[0]}x{conv.kernel_size[1]} {_kind(conv)}"


def _finished(branch: nn.Module, conv: nn.Conv2d, name: str, kind: str) -> nn.Module:
    """Append the norm that keeps a branch at zero, and check its output shape."""
    layers = branch if isinstance(branch, nn.Sequential) else [branch]
    norm = nn.BatchNorm2d(conv.out_channels)
    nn.init.zeros_(norm.weight)  # Its bias is zero already.
    finished = nn.Sequential(*layers, norm).to(conv.weight)
    _check_shape(finished, conv, f"block={kind}: a branch of {name or 'the model'}")
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


def _attach(conv: nn.Conv2d, branches: list[nn.Module]) -> None:
    if not isinstance(conv, ExpandedConv2d):
        if isinstance(conv, Conv2dSame):
            conv.pad = SamePad2d(conv).train(conv.training)
        # Changing the class instead of the module keeps every name, hook and reference valid.
        conv.__class__ = _EXPANDED[type(conv)]
        conv.branches = nn.ModuleList().train(conv.training)
    cast(ExpandedConv2d, conv).branches.extend(branches)
