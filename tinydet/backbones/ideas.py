"""The ideas of an experiment, applied to a backbone with its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

from tinydet.backbones.frozen import check_left_alone
from tinydet.backbones.surgery import add_attention, replace_activation
from tinydet.config import ConfigError, Model
from tinydet.reparam.expand import expand

# Large enough that the deepest map of a stride of 32 has more than one cell.
_EXAMPLE = (1, 3, 128, 128)


def apply_ideas(module: nn.Module, config: Model, fixed: Sequence[str] = ()) -> nn.Module:
    """Return a backbone with the ideas that an experiment names.

    Their order is frozen norms, activation, attention, expand. Each begins as (nearly) the
    function that it is put into, so the backbone's weights keep their worth; what is not touched
    keeps its names and weights.

    Args:
        module: the backbone, with its weights; not modified by ideas other than frozen norms.
        config: the experiment's model.
        fixed: names of its modules that do not learn.

    Raises:
        ConfigError: an idea finds no place in this backbone or takes one that does not learn, or a
            place is named without an idea.
    """
    if config.freeze_norms:
        module = freeze_batch_norm_2d(module)
    for idea, example in (("activation", "acon-c"), ("attention", "coord"), ("expand", "dbb")):
        kind, where = getattr(config, idea), getattr(config, f"{idea}_where")
        if kind == "none":
            if where:
                raise ConfigError(
                    f"model.{idea}_where={where}: needs an idea, e.g. model.{idea}={example}"
                )
            continue
        try:
            module = _apply(module, idea, kind, where, config)
            check_left_alone(module, fixed)
        except ValueError as error:
            raise ConfigError(f"model.{idea}={kind}, model.{idea}_where: {error}") from error
    return module


def _apply(module: nn.Module, idea: str, kind: str, where: str, config: Model) -> nn.Module:
    if idea == "expand":
        return expand(module, kind, where)
    example = torch.zeros(_EXAMPLE)
    if idea == "activation":
        return replace_activation(module, kind, example, where)
    return add_attention(module, kind, example, config.attention_place, where)
