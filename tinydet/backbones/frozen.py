"""Fixed first stages of a backbone: the backward pass ends behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tinydet.backbones.calls import eval_mode
from tinydet.config import ConfigError
from tinydet.reparam.verify import tensors_in

# Large enough that the deepest map of a stride of 32 has more than one cell.
_EXAMPLE = (1, 3, 128, 128)


def freeze_stages(
    module: nn.Module, build: Callable[..., nn.Module], stages: int, index: int
) -> tuple[str, ...]:
    """Fix what runs before a backbone's n-th feature map: its weights need no gradient any more.

    What that is follows from the gradients of that map, in a second network that returns it too.
    All of it is upstream of what learns, so autograd records nothing there. Its modules have to
    stay in eval mode as well (`keep_fixed`): norms keep their statistics, nothing is dropped.

    Args:
        module: the backbone, which returns the map `index`; its parameters are changed in place.
        build: makes a network of the same structure that returns the maps `out_indices`.
        stages: n, from 1.
        index: of the map that the backbone returns, among timm's feature maps.

    Returns:
        The names of the fixed modules, without those inside another of them.

    Raises:
        ConfigError: the backbone has fewer maps, or they do not tell what they are made by.
    """
    if stages > index + 1:
        raise ConfigError(
            f"model.freeze_stages={stages}: up to the feature map that model.feature names this "
            f"backbone has stages 1 to {index + 1}; take one of them, or 0"
        )
    # The weights drawn here are of no use: the next layers draw what they would without this.
    with torch.random.fork_rng(devices=[]):
        twin = build(out_indices=tuple(sorted({stages - 1, index})))
    try:
        modules, parameters = _makers_of_first_map(twin)
        for name in modules:
            module.get_submodule(name).requires_grad_(False)
        for name in parameters:
            module.get_parameter(name).requires_grad_(False)
    except Exception as error:  # What a network raises on an input is of any type.
        problem = str(error).split("\n")[0]
        raise ConfigError(
            f"model.freeze_stages={stages}: the gradients of this backbone do not tell which "
            f"layers make its feature map {stages} ({problem}); take 0 or another backbone"
        ) from error
    return tuple(n for n in modules if not is_fixed(n.rpartition(".")[0], modules))


def keep_fixed(module: nn.Module, fixed: Sequence[str]) -> None:
    """Put the modules of these names into eval mode; folding may have taken some of them away."""
    for name, part in module.named_modules():
        if name in fixed:
            part.eval()


def is_fixed(name: str, fixed: Sequence[str]) -> bool:
    """Tell whether a module or parameter is, or is in, one of the fixed modules."""
    return any(name == part or name.startswith(f"{part}.") for part in fixed)


def check_left_alone(module: nn.Module, fixed: Sequence[str]) -> None:
    """Refuse weights that learn inside fixed modules.

    Raises:
        ValueError: there are some; says where there is room for them.
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
        f"new weights in what model.freeze_stages fixes, e.g. {inside[0]}; name places that "
        f"learn, which are in {' '.join(free) or 'no part of this backbone'}"
    )


def _makers_of_first_map(network: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the modules and parameters that the first returned map is made by."""
    outputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in network.named_modules():

        def note(module: nn.Module, args: object, output: object, name: str = name) -> None:
            del module, args
            tensors = [t for t in tensors_in(output) if t.requires_grad]
            outputs.setdefault(name, []).extend(tensors)

        if name:  # The network itself returns the map, and much else.
            handles.append(module.register_forward_hook(note))
    try:
        with eval_mode(network), torch.enable_grad():
            first = network(torch.zeros(_EXAMPLE))[0]
    finally:
        for handle in handles:
            handle.remove()
    parameters = dict(network.named_parameters())
    asked = [*parameters.values(), *(t for made in outputs.values() for t in made)]
    gradients = torch.autograd.grad(first.sum(), asked, allow_unused=True)
    makers = {id(t) for t, gradient in zip(asked, gradients, strict=True) if gradient is not None}
    return (
        [name for name, made in outputs.items() if made and all(id(t) in makers for t in made)],
        [name for name, parameter in parameters.items() if id(parameter) in makers],
    )
