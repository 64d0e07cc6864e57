"""Fold a trained network: the same function with fewer layers.

Parallel branches are merged into single convolutions, then batch norms and constant factors are
fused into the convolutions or linear layers next to them, then layers in series are merged where
that is cheaper. This happens on a float64 copy, which is compared with the original before its
weights are cast back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tinydet.reparam.affine import branch_sums, multiply_adds
from tinydet.reparam.apply_changes import Network
from tinydet.reparam.bake import bake
from tinydet.reparam.compared import (
    Operations,
    buffers_restored,
    changed_buffers,
    choose_examples,
    run_in_own_dtype,
    why_imprecise,
)
from tinydet.reparam.dataflow import DataFlow, observe, storage_of
from tinydet.reparam.exact import exact_arithmetic, exact_copy, one_thread
from tinydet.reparam.examples import ExampleInput, as_examples
from tinydet.reparam.expand import matches
from tinydet.reparam.factors import count_scales
from tinydet.reparam.like_original import like_original
from tinydet.reparam.merge import merge_branches, merge_series
from tinydet.reparam.norms import count_norms, is_norm
from tinydet.reparam.report import FoldReport
from tinydet.reparam.scales import fold_scales
from tinydet.reparam.verify import tensors_in
from tinydet.reparam.weight_ranges import weight_ranges

Where = Callable[[str, nn.Module], bool]

_DIFFERENT_IN_TRAINING = (
    *(nn.modules.dropout._DropoutNd, nn.RReLU, nn.RNNBase, nn.MultiheadAttention),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)

# Arithmetic in float64 changes settings of the whole process: one fold at a time.
_LOCK = threading.RLock()


def fold(
    model: nn.Module,
    example_input: ExampleInput | list[ExampleInput],
    where: str | Where = "",
) -> tuple[nn.Module, FoldReport]:
    """Return a copy of a network with its branches merged and its batch norms folded.

    The structure of the result depends on the network's architecture and not on its weights: a
    folded state dict loads strictly into another folded copy. Folding twice changes nothing.

    The data flow is observed for the first example, on random values of as small a size as the
    network takes with the same operations. The result is compared in float64 on these and, where
    the network takes them, on odd, larger and smaller sizes and another batch size; for further
    examples on random values and their own. In its own dtype it is compared on all examples.
    What no example reaches is not compared: give several, `[first, second]`, if arguments decide
    which code runs. The result takes every input that the original takes.

    Threads may call this at the same time, but one waits for the other. Meanwhile new tensors of
    the process are of float64 by default.

    Args:
        model: the network, in eval mode; it is not modified, but its hooks run. Its forward pass
            must work in float64 and on the CPU, where the folding is done.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments;
            or a list of several such examples.
        where: what to fold: name patterns separated by spaces, where a module's name covers
            everything in it ("stages.2 stages.3"), or a function of a module's qualified name and
            the module. A change is made if all modules it touches are selected. The empty string
            means all.

    Returns:
        The folded network, with the original's dtypes and devices, and the report.

    Raises:
        ValueError: the model is in training mode or does not run in float64, nothing is selected,
            the outputs hold no numbers to compare, or the folded network computes another function,
            also in its own dtype.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    _check(model)
    selects = _selection(model, where)
    given = as_examples(example_input)
    with _LOCK, torch.inference_mode(False), torch.no_grad(), one_thread():
        ran, runs = [Operations() for _ in given], [Operations() for _ in given]
        with buffers_restored(model):
            own = [run_in_own_dtype(model, x, mode) for x, mode in zip(given, ran, strict=True)]
        with exact_arithmetic():
            original = exact_copy(model)
            examples, expected, flow = choose_examples(original, given, ran[0].names)
            counters = changed_buffers(original, model)
            # First compare on one input after each change, which is fast, and on all in the end.
            # If that fails, start over and compare on all inputs after each change.
            for again, compared in enumerate((1, len(examples))):
                if again:
                    original = exact_copy(model)
                    flow = observe(original, examples[0], is_leaf=is_norm)
                network = Network(
                    original,
                    examples[:compared],
                    expected[:compared],
                    partial(exact_copy, model),
                    flow,
                    selects,
                )
                before = _Counts.of(network.flow)
                baked, computed = bake(network)
                norms_before = count_norms(network.model)
                merged, branches = merge_branches(network)
                moved, norms = fold_scales(network)
                rows = merge_series(network)
                after = _Counts.of(network.flow)
                network.examples, network.expected = examples, expected
                problem = network.why_different() or _unregistered(network)
                if not problem:
                    break
        folded, max_rel = network.model, network.max_rel
        like_original(folded, model, counters)
        for output, example, mode in zip(own, given, runs, strict=True):
            with buffers_restored(folded):
                problem = problem or why_imprecise(model, folded, example, output, mode)
    if problem:
        raise ValueError(f"{type(model).__name__}: folded, {problem}; not folded")
    report = FoldReport(
        folded=(*baked, *merged, *moved, *rows),
        kept=(*computed, *branches, *norms),
        norms_before=norms_before,
        norms_after=count_norms(folded),
        params_before=sum(p.numel() for p in model.parameters()),
        params_after=sum(p.numel() for p in folded.parameters()),
        macs_before=ran[0].macs or before.macs,
        macs_after=runs[0].macs or after.macs,
        branches_before=before.branches,
        branches_after=after.branches,
        scales_before=before.scales,
        scales_after=after.scales,
        max_rel=max_rel,
        ranges_before=tuple(weight_ranges(model)),
        ranges_after=tuple(weight_ranges(folded)),
    )
    return folded.eval(), report


@dataclass(frozen=True)
class _Counts:
    macs: int
    branches: int
    scales: int

    @classmethod
    def of(cls, flow: DataFlow) -> _Counts:
        return cls(multiply_adds(flow.ops), len(branch_sums(flow)), count_scales(flow))


def _unregistered(network: Network) -> str:
    """Return which weights the network uses that are not among its parameters, if any."""
    own = {storage_of(parameter) for parameter in network.model.parameters()}
    for op in network.flow.ops:
        for tensor in tensors_in((op.args, op.kwargs)):
            if isinstance(tensor, nn.Parameter) and storage_of(tensor) not in own:
                return f"{op.scope or 'its code'} uses weights that are not among its parameters"
    return ""


def _selection(model: nn.Module, where: str | Where) -> Where | None:
    if not isinstance(where, str):
        if not any(where(name, module) for name, module in model.named_modules()):
            raise ValueError("where: selects no module of the network")
        return where
    patterns = where.split()
    if not patterns:
        return None
    for pattern in patterns:
        if not any(matches(name, pattern) for name, _ in model.named_modules()):
            raise ValueError(f"where={where!r}: no module of the network is named {pattern!r}")
    return lambda name, _: any(matches(name, pattern) for pattern in patterns)


def _check(model: nn.Module) -> None:
    """Raise ValueError for a network that is in training mode, or that cannot be copied and run."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{type(model).__name__} is TorchScript; fold the network it was made from"
        )
    for name, module in model.named_modules():
        where = f"its layer {name}" if name else type(model).__name__
        # Of torch's own layers only these differ in training, of others any may.
        acts = is_norm(module) or isinstance(module, _DIFFERENT_IN_TRAINING)
        acts = acts or not type(module).__module__.startswith("torch.nn.modules.")
        if module.training and (module is model or acts):
            raise ValueError(f"{where} is in training mode; call model.eval() before fold(model)")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            raise ValueError(
                f"{where} has no weights before it has run once: run the network first"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values; load the weights first"
            )
