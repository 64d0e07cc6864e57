"""Matches the tensors of a file with those of a network by their names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def without_prefix(
    tensors: Mapping[str, Tensor], known: Iterable[str]
) -> tuple[dict[str, Tensor], str]:
    """Take off what wrappers put before the names: `module.`, `backbone.` and so on.

    Args:
        tensors: a state dict.
        known: names of the network's tensors, some of which the file is expected to have.

    Returns:
        The tensors whose names begin with the prefix that makes most names known ones, under their
        names without it; and the prefix, which ends in a dot or is empty.
    """
    wanted = {_plain(name) for name in known}
    counts: Counter[str] = Counter()
    for name in tensors:
        for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")):
            if _plain(name[start:]) in wanted:
                counts[name[:start]] += 1
    prefix = max(counts, key=lambda p: (counts[p], -len(p)), default="")
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return found, prefix


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give every tensor of a feature extractor the one of that name, or none of them.

    Args:
        module: made by timm with `features_only`, which writes `stages_0` for `stages.0`.
        tensors: of the whole network or of such an extractor; others than the module's are ignored.
        source: where they come from and of which network they should be, for the message.

    Raises:
        ValueError: a tensor is missing, of another shape, or holds integers for fractions.
    """
    body = module.model if isinstance(module, FeatureGetterNet) else module
    own = body.state_dict()
    found, prefix = without_prefix(tensors, own)
    by_plain_name = {_plain(name): tensor for name, tensor in found.items()}
    given = {name: found.get(name, by_plain_name.get(_plain(name))) for name in own}
    # Files of old lack these counters, which nothing reads.
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    wrong = {name: why for name in needed if (why := _why_wrong(given[name], own[name]))}
    if wrong:
        name, why = next(iter(wrong.items()))
        raise ValueError(
            f"{source}: {len(wrong)} of the {len(needed)} tensors needed are missing or of another "
            f"shape or type, e.g. {name} {why}; the file's names are such as "
            f"{next(iter(tensors), 'none')}"
            + (f", and taking their prefix {prefix} off is not enough" if prefix else "")
            + ". Is it this model's file?"
        )
    if prefix:
        logger.info(f"{source}: took the prefix {prefix} off the names of its tensors")
    body.load_state_dict({name: own[name] if t is None else t for name, t in given.items()})


def _plain(name: str) -> str:
    return name.replace("_", ".")


def _why_wrong(given: Tensor | None, own: Tensor) -> str:
    if given is None:
        return "is missing"
    if given.shape != own.shape:
        return f"has the shape {tuple(given.shape)}, not {tuple(own.shape)}"
    # The small numbers of a quantised network mean nothing without their scales.
    fractions = given.is_floating_point() and given.dtype.itemsize > 1
    if own.is_floating_point() and not fractions:
        return f"is of type {given.dtype}, not {own.dtype}"
    return ""
