"""Frozen first stages of a backbone, for which no gradients are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tinydet.backbones.module_trace import eval_mode
from tinydet.config import ConfigError
from tinydet.reparam.verify import tensors_in

# Large enough that the deepest map of stride 32 has more than one pixel.
_EXAMPLE = (1, 3, 128, 128)


def freeze_stages(
    module: nn.Module, build: Callable[..., nn.Module], stages: int, index: int
) -> tuple[str, ...]:
    """Freeze the parameters that a backbone's n-th feature map depends on.

    They are found from the gradients of that map, in a second network that returns it. All of them
    are upstream of the layers that learn, so autograd records nothing there. The frozen modules
    must also stay in eval mode (`keep_fixed`), so that norms keep their statistics and nothing is
    dropped out.

    Args:
        module: the backbone; `requires_grad` of its parameters is set in place.
        build: builds a network of the same structure that returns the maps `out_indices`.
        stages: n, from 1.
        index: index of the map that the backbone returns, among timm's feature maps.

    Returns:
        The names of the frozen modules, without those inside another one.

    Raises:
        ConfigError: the backbone has fewer maps, or the gradients do not show what they depend on.
    """
    if stages > index + 1:
        raise ConfigError(
            f"model.freeze_stages={stages}: up to the map of model.feature this backbone has "
            f"stages 1 to {index + 1}; choose one of them, or 0"
        )
    # Keeps the random weights of the layers built later the same as without frozen stages.
    with torch.random.fork_rng(devices=[]):
        twin = build(out_indices=tuple(sorted({stages - 1, index})))
    try:
        modules, parameters = _dependencies_of_first_map(twin)
        for name in modules:
            module.get_submodule(name).requires_grad_(False)
        for name in parameters:
            module.get_parameter(name).requires_grad_(False)
    except Exception as error:  # Networks raise any type of error on an input.
        problem = str(error).split("\n")[0]
        raise ConfigError(
            f"model.freeze_stages={stages}: the gradients of this backbone do not show which "
            f"layers compute its feature map {stages} ({problem}); choose 0 or another backbone"
        ) from error
    return tuple(n for n in modules if not is_fixed(n.rpartition(".")[0], modules))


def keep_fixed(module: nn.Module, fixed: Sequence[str]) -> None:
    """Put the modules with these names in eval mode; some may have been removed by folding."""
    for name, part in module.named_modules():
        if name in fixed:
            part.eval()


def is_fixed(name: str, fixed: Sequence[str]) -> bool:
    """Return whether a module or parameter is one of the fixed modules or inside one."""
    return any(name == part or name.startswith(f"{part}.") for part in fixed)


def check_not_modified(module: nn.Module, fixed: Sequence[str]) -> None:
    """Check that no trainable parameters were added inside fixed modules.

    Raises:
        ValueError: there are some; the message lists the modules that learn.
    """
    learning = [name for name, p in module.named_parameters() if p.requires_grad]
    inside = [name for name in learning if is_fixed(name, fixed)]
    if not inside:
        return
    free = [
        name
        for name, part in module.named_modules()
        if name
        and any(p.requires_grad for p in part.parameters())
        and not any(is_fixed(name, [f]) or is_fixed(f, [name]) for f in fixed)
    ]
    free = [name for name in free if name.rpartition(".")[0] not in free]
    raise ValueError(
        f"adds weights to modules frozen by model.freeze_stages, e.g. {inside[0]}; name places "
        f"that learn, which are in {' '.join(free) or 'no part of this backbone'}"
    )


def _dependencies_of_first_map(network: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the modules and parameters that the first returned map depends on."""
    outputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in network.named_modules():

        def record(module: nn.Module, args: object, output: object, name: str = name) -> None:
            del module, args
            tensors = [t for t in tensors_in(output) if t.requires_grad]
            outputs.setdefault(name, []).extend(tensors)

        if name:  # The network itself also returns other maps.
            handles.append(module.register_forward_hook(record))
    try:
        with eval_mode(network), torch.enable_grad():
            first = network(torch.zeros(_EXAMPLE))[0]
    finally:
        for handle in handles:
            handle.remove()
    parameters = dict(network.named_parameters())
    tensors = [*parameters.values(), *(t for made in outputs.values() for t in made)]
    gradients = torch.autograd.grad(first.sum(), tensors, allow_unused=True)
    used = {id(t) for t, gradient in zip(tensors, gradients, strict=True) if gradient is not None}
    return (
        [name for name, made in outputs.items() if made and all(id(t) in used for t in made)],
        [name for name, parameter in parameters.items() if id(parameter) in used],
    )
