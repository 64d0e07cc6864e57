"""Matches the tensors of a file with those of a network by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn


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


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> str:
    """Give every tensor of a feature extractor the one of that name, or none of them.

    Args:
        module: made by timm with `features_only`, which writes `stages_0` for `stages.0`.
        tensors: of the whole network or of such an extractor; others than the module's are ignored.
        source: where they come from and of which network they should be, for the message.

    Returns:
        What was not taken as it is, in words; empty where that is nothing.

    Raises:
        ValueError: a tensor is missing, of another shape, or holds integers for fractions.
    """
    # Two of timm's wrappers hold the network so, under its own names.
    children = dict(module.named_children())
    body = next(iter(children.values())) if set(children) in ({"model"}, {"body"}) else module
    own = body.state_dict()
    found, prefix = without_prefix(tensors, own)
    by_plain_name = {_plain(name): tensor for name, tensor in found.items()}
    given = {name: found.get(name, by_plain_name.get(_plain(name))) for name in own}
    reasons = {name: _why_wrong(given[name], own[name]) for name in own}
    # Files of old lack these counters, which nothing reads.
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    wrong = [name for name in needed if reasons[name]]
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} of the {len(needed)} tensors needed are missing or of another "
            f"shape or type, e.g. {wrong[0]} {reasons[wrong[0]]}; the file's names are such as "
            f"{next(iter(tensors), 'none')}"
            + (f", and taking their prefix {prefix} off is not enough" if prefix else "")
            + ". Is it this model's file?"
        )
    body.load_state_dict({name: own[name] if reasons[name] else given[name] for name in own})
    known = {_plain(name) for name in own}
    unused = [name for name in found if _plain(name) not in known]
    remarks = [f"took the prefix {prefix} off the names of its tensors"] if prefix else []
    if unused:
        remarks.append(f"{len(unused)} tensors have no place in the backbone, e.g. {unused[0]}")
    return "; ".join(remarks)


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
