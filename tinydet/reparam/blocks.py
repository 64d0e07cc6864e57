"""Blocks that can re-parameterize themselves: RepVGG, MobileOne, RepViT, FastViT and others.

timm's `reparameterize_model` calls these methods as well, and believes them. Here each block's
result is compared with the block before it takes its place, so a method that is wrong for this
block (branches that ignore the dilation, layers of a fixed dtype, a crash on the second call)
leaves the block as it was. The block may also be the model itself.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from tinydet.reparam.conv_norm import replace_module
from tinydet.reparam.hooks import calls_recorded, give_hooks, has_hooks, hooks_off
from tinydet.reparam.norms import count_norms
from tinydet.reparam.report import Step
from tinydet.reparam.verify import Difference, difference

# timm's names, in its order. `fuse` returns the replacement, the others work in place.
_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
_TOLERANCE = 1e-9


def reparameterize_blocks(
    model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[nn.Module, list[Step], list[Step]]:
    """Let each block that knows how re-parameterize itself, outer blocks first.

    Args:
        model: the network in eval mode and float64; changed in place.
        inputs: positional arguments for the forward pass in which the blocks are observed.

    Returns:
        The network (another object if it is such a block itself), what was folded, and the blocks
        that keep norms because their own method failed.
    """
    folded: list[Step] = []
    failed: list[tuple[str, nn.Module, str]] = []
    tried: set[nn.Module] = set()
    while pending := _outermost_blocks(model, tried):
        tried.update(pending.values())
        with calls_recorded(list(pending.values())) as records:
            model(*inputs)
        for name, block in pending.items():
            if block not in records:
                continue
            try:
                new, changed = _reparameterized(block, records[block], is_root=block is model)
            except Exception as error:
                # The method is another library's: whatever it raises, the block stays as it is.
                failed.append((name, block, str(error).split("\n")[0]))
                continue
            if not changed:
                continue
            tried.add(new)
            norms = count_norms(block) - count_norms(new)
            folded.append(Step(name, f"{type(block).__name__} re-parameterized, {norms} norms"))
            if block is model:
                model = new
            else:
                replace_module(model, block, new)
    present = set(model.modules())
    kept = [
        Step(name, f"{type(block).__name__} could not re-parameterize itself: {why}")
        for name, block, why in failed
        if block in present and count_norms(block)
    ]
    drop_stray_tensors(model)
    return model, folded, kept


def drop_stray_tensors(model: nn.Module) -> None:
    """Delete the dense identity kernels that timm's blocks leave behind as plain attributes."""
    for module in model.modules():
        if isinstance(vars(module).get("id_tensor"), Tensor):
            del module.id_tensor


def _outermost_blocks(model: nn.Module, tried: set[nn.Module]) -> dict[str, nn.Module]:
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(outer + ".") for outer in blocks)
        if not inside and module not in tried and _method(module):
            blocks[name] = module
    return blocks


def _method(module: nn.Module) -> str | None:
    return next((m for m in _METHODS if callable(getattr(type(module), m, None))), None)


def _reparameterized(
    block: nn.Module, record: tuple[Any, Any, Any], is_root: bool
) -> tuple[nn.Module, bool]:
    """Return the block's re-parameterized copy, and whether anything in it changed.

    Raises:
        ValueError: the copy does not compute what the block does.
        Exception: whatever the block's own method raises.
    """
    if any(has_hooks(module) for module in block.modules() if module is not block):
        raise ValueError("a module inside has a forward hook")
    if is_root and has_hooks(block):
        raise ValueError("it has a forward hook")
    with hooks_off(block):
        new = copy.deepcopy(block)
    new_tensors = {name: _plain_tensors(module) for name, module in new.named_modules()}
    method = _method(block)
    result = getattr(new, str(method))()
    if method == "fuse":
        if not isinstance(result, nn.Module):
            raise ValueError("fuse() returned no module")
        new = result
    for name, module in new.named_modules():
        for attribute in _plain_tensors(module) - new_tensors.get(name, set()):
            delattr(module, attribute)
    new.eval()
    args, kwargs, output = record
    found = _distance(new, args, kwargs, output)
    if not found.max_rel <= _TOLERANCE:
        raise ValueError(f"the result differs by {found.max_rel:.1e} of the largest output")
    give_hooks(block, new)
    return new, _structure(new) != _structure(block)


def _distance(new: nn.Module, args: Any, kwargs: Any, output: Any) -> Difference:
    copies = copy.deepcopy((args, kwargs))
    return difference(output, new(*copies[0], **copies[1]))


def _plain_tensors(module: nn.Module) -> set[str]:
    return {name for name, value in vars(module).items() if isinstance(value, Tensor)}


def _structure(module: nn.Module) -> list[Any]:
    modules = [(name, type(child)) for name, child in module.named_modules()]
    return [modules, [(name, tuple(t.shape)) for name, t in module.state_dict().items()]]
