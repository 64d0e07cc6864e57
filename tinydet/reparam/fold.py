"""Fold a trained network: the same function with fewer layers.

Parallel branches are merged into single convolutions, then batch norms and constant factors are
fused into the convolutions or linear layers next to them, then layers in series are merged where
that is cheaper. This happens on a float64 copy, which is compared with the original before its
weights are cast back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinydet.reparam.affine import branch_sums, multiply_adds
from tinydet.reparam.bake import bake, copy_network
from tinydet.reparam.dataflow import observe
from tinydet.reparam.exact import exact_arithmetic
from tinydet.reparam.factors import count_scales
from tinydet.reparam.merge import merge_branches, merge_series
from tinydet.reparam.norms import count_norms, is_norm
from tinydet.reparam.report import FoldReport
from tinydet.reparam.scales import fold_scales
from tinydet.reparam.verify import copied, difference, why_different


def fold(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> tuple[nn.Module, FoldReport]:
    """Return a copy of a network with its branches merged and its batch norms folded.

    The structure of the result depends on the network's architecture and not on its weights: a
    folded state dict loads strictly into another folded copy. Folding twice changes nothing.

    Args:
        model: the network, in eval mode; it is not modified. Its forward pass must work in float64
            and on the CPU, where the folding is done.
        example_input: a small input, or a tuple of positional arguments. The data flow is observed
            on random values of its shape; the result is checked on these, on the example itself
            and, for a batch of images, on a larger batch. The result takes every input that the
            original takes.

    Returns:
        The folded network, with the original's dtypes and devices, and the report.

    Raises:
        ValueError: the model is in training mode, or the folded one computes another function.
    """
    _check_eval_mode(model)
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    with torch.inference_mode(False), torch.no_grad():
        with exact_arithmetic():
            original = copy_network(model).cpu().double()
            # Random values first: an all-zero example would hide most differences.
            checks = [_random_like(arguments), _as_float64(arguments)]
            if other := _of_another_size(original, checks[0]):
                checks.append(other)
            before = _Counts.of(original, checks[0])
            # First compare on one input after each change, which is fast, and on all in the end.
            # If that fails, start over and compare on all inputs after each change.
            for compared in (checks[:1], checks):
                folded, baked, computed = bake(copy.deepcopy(original), compared)
                norms_before = count_norms(folded)
                folded, merged, branches = merge_branches(folded, compared)
                folded, moved, norms = fold_scales(folded, compared)
                folded, rows = merge_series(folded, compared)
                problem, max_rel = _compared(original, folded, checks)
                if not problem:
                    break
            if problem:
                raise ValueError(f"{type(model).__name__}: folded, {problem}; not folded")
            after = _Counts.of(folded, checks[0])
        _restore_dtype_and_device(folded, model)
    report = FoldReport(
        folded=(*baked, *merged, *moved, *rows),
        kept=(*computed, *branches, *norms),
        norms_before=norms_before,
        norms_after=count_norms(folded),
        params_before=sum(p.numel() for p in model.parameters()),
        params_after=sum(p.numel() for p in folded.parameters()),
        macs_before=before.macs,
        macs_after=after.macs,
        branches_before=before.branches,
        branches_after=after.branches,
        scales_before=before.scales,
        scales_after=after.scales,
        max_rel=max_rel,
    )
    return folded.eval(), report


def _compared(
    original: nn.Module, folded: nn.Module, checks: list[tuple[Any, ...]]
) -> tuple[str, float]:
    """Return how a folded network's outputs are wrong, if they are, and the largest difference."""
    max_rel = 0.0
    for given in checks:
        try:
            expected, found = (form(*copied(given)) for form in (original, folded))
            problem = why_different(original, given, expected, found)
            max_rel = max(max_rel, difference(expected, found).max_rel)
        except (RuntimeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"it does not run as before ({what})", math.inf
        if problem:
            return problem, max_rel
    return "", max_rel


@dataclass(frozen=True)
class _Counts:
    macs: int
    branches: int
    scales: int

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...]) -> _Counts:
        flow = observe(model, inputs, is_leaf=is_norm)
        return cls(multiply_adds(flow.ops), len(branch_sums(flow)), count_scales(flow))


def _check_eval_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        acts = is_norm(module) or isinstance(module, nn.modules.dropout._DropoutNd)
        if module.training and (module is model or acts):
            where = f"its layer {name}" if name else type(model).__name__
            raise ValueError(f"{where} is in training mode; call model.eval() before fold(model)")


def _as_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_moved(x) if isinstance(x, Tensor) else x for x in arguments)


def _moved(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    return x.double() if x.is_floating_point() else x.clone()


def _random_like(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def random(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if x.dtype == torch.uint8:
            return torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
        return _moved(x)  # Indices and masks: other values may not be legal.

    return tuple(random(x) for x in arguments)


def _of_another_size(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return more and larger images, if the model takes one batch of images of any size."""
    if len(arguments) != 1 or not isinstance(arguments[0], Tensor) or arguments[0].ndim != 4:
        return None
    images, channels, height, width = arguments[0].shape
    larger = torch.empty(images + 1, channels, height + 32, width + 64, dtype=arguments[0].dtype)
    given = _random_like((larger,))
    try:
        model(*copied(given))
    except Exception:
        # Any model may reject other sizes, with any exception.
        return None
    return given


def _restore_dtype_and_device(folded: nn.Module, original: nn.Module) -> None:
    """Restore each weight's dtype and device; a new weight gets those of its block's first one."""
    like = dict(_floating(original))
    for path, tensor in _floating(folded):
        source = like.get(path)
        scope = path
        while source is None and scope:
            scope = scope.rpartition(".")[0]
            prefix = scope + "." if scope else ""
            inside = [t for name, t in like.items() if name.startswith(prefix)]
            # Kernels first: norms may be kept in float32 beside bfloat16 convolutions.
            source = next((t for t in inside if t.ndim > 1), inside[0] if inside else None)
        if source is not None:
            tensor.data = tensor.data.to(device=source.device, dtype=source.dtype)
    devices = {p: t.device for p, t in original.named_buffers() if not t.is_floating_point()}
    for path, buffer in folded.named_buffers():
        if path in devices:
            buffer.data = buffer.data.to(devices[path])


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (model.named_parameters(), model.named_buffers()):
        yield from ((name, tensor) for name, tensor in named if tensor.is_floating_point())
