"""From a folded network's weights back to a network with norms, to train it further."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinydet.reparam.fold import fold
from tinydet.reparam.norms import is_norm
from tinydet.reparam.verify import compare_outputs

# Of float32; weights that do not belong together differ by far more.
_TOLERANCE = 1e-3


def unfold(
    model: nn.Module, tensors: Mapping[str, Tensor], example_input: Tensor
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights with which a network with norms computes what its folded form computes.

    Folding multiplies a norm's scale into the conv before it, and puts the rest into the conv's
    bias. Here the conv keeps its scaled weight, and the norm adds the bias, with statistics of 0
    and 1. That is the same function in eval mode; for training see `calibrate_norms`.

    Args:
        model: in eval mode, without branches; it is not modified.
        tensors: state dict of its folded form. That of a network with branches besides is the same.
        example_input: random values, for folding and to compare the two.

    Returns:
        The state dict, and the names of the norms.

    Raises:
        ValueError: the tensors are not of its folded form, or folding did more than put norms into
            convs, as where the model has branches of its own.
    """
    folded, report = fold(model, example_input)
    try:
        folded.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError("the tensors are not of the folded form of this network") from error
    state = model.state_dict()
    state |= {name: tensor for name, tensor in tensors.items() if name in state}
    modules, norms = dict(model.named_modules()), []
    for step in report.folded:
        norm: Any = modules.get(step.name)
        conv = step.detail.removeprefix("into ")
        bias = tensors.get(f"{conv}.bias")
        if norm is None or not is_norm(norm) or bias is None:
            continue  # If it matters, the comparison fails.
        if f"{conv}.bias" in state:
            state[f"{conv}.bias"] = torch.zeros_like(bias)
        state[f"{step.name}.weight"] = torch.ones_like(bias)
        state[f"{step.name}.bias"] = bias
        state[f"{step.name}.running_mean"] = torch.zeros_like(bias)
        state[f"{step.name}.running_var"] = torch.ones_like(bias) - norm.eps
        norms.append(step.name)
    unfolded = copy.deepcopy(model)
    unfolded.load_state_dict(state)
    if compare_outputs(folded, unfolded, [example_input]).max_rel > _TOLERANCE:
        raise ValueError("its deploy form has lost layers that training needs")
    return state, tuple(norms)


def calibrate_norms(model: nn.Module, names: Sequence[str], inputs: Tensor) -> None:
    """Give unfolded norms the statistics of a batch, in place; the function stays the same.

    Their input is normalized already, so its statistics are not 0 and 1: in training they would
    normalize it again. Here a norm's weight becomes the standard deviation of its input and its
    bias that of before plus the mean, so that it computes the same with these statistics.

    Args:
        model: the network.
        names: of the norms, batch norms of (B, C, H, W).
        inputs: a batch, as in training.
    """
    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(_calibrate) for name in names]
    was_training = model.training
    with torch.no_grad():
        model.eval()(inputs)
    model.train(was_training)
    for hook in hooks:
        hook.remove()


def _calibrate(norm: Any, args: tuple[Tensor]) -> None:
    var, mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)
    for tensor, value in (
        (norm.bias, norm.bias + mean),
        (norm.weight, (var + norm.eps).sqrt()),
        (norm.running_mean, mean),
        (norm.running_var, var),
    ):
        tensor.copy_(value)
