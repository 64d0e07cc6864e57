"""One model folded, and compared with the original by everything it returns.

The folded and the unfolded network are compared in float64, on other batch and input sizes as well.
Both are also run in float32 and compared with the unfolded one in float64: the unfolded network's
own float32 error is the baseline for the folded one's. Of a detector the feature maps are compared
too, and in float32 only these: a rounding error can change which boxes it keeps.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fold_cost import measured
from random_weights import settle_norms
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from zoo_models import build_model, example_inputs, family_of, input_sizes

from tinydet.reparam.exact import exact_arithmetic
from tinydet.reparam.fold import fold
from tinydet.reparam.norms import is_norm, why_not_linear
from tinydet.reparam.report import FoldReport
from tinydet.reparam.verify import copied, difference, tensors_in

_TOLERANCE_64 = 1e-9
_TOLERANCE_32 = 1e-4
# Added to the height and width of the example: larger, odd, smaller.
_OTHER_SIZES = ((32, 64), (-5, 3), (-32, -16))


@dataclass(frozen=True)
class FoldRow:
    """The outcome of folding one model.

    Errors are the largest difference in a feature map as a fraction of its largest value.

    Attributes:
        model: its name.
        family: the module that defines it.
        input: side of the input in pixels.
        norms_before: norms in the model, of any kind.
        norms_after: norms in the folded model.
        norms_never: those of them that no fold can remove, because they compute their statistics
            from each input, as layer norm does.
        branches_before: additions of parallel linear branches with a common input.
        branches_after: the same in the folded model.
        scales_before: multiplications by a constant right after a conv or linear layer.
        scales_after: the same in the folded model.
        macs_before: multiply-adds of a forward pass of two images.
        macs_after: the same of the folded model.
        params_before: parameters in the model.
        params_after: parameters in the folded model.
        error64: folded against unfolded, in float64, over all inputs tried.
        error32: folded in float32 against unfolded in float64.
        baseline32: unfolded in float32 against unfolded in float64.
        other_sizes: (height, width) of the other inputs the two were compared on; the unfolded
            model takes no other of those tried.
        kept: the reasons of the norms that remain, and how many norms each applies to.
        unexplained: norms that remain without a reason.
        changed_again: modules that folding the folded model changes.
        cpu_seconds: processor time of the fold.
        peak_mb: most memory that the fold takes beyond what the process had before, in MB; None
            where the system does not tell.
        float64_mb: size of the model's weights in float64, in MB.
        seconds: time for all of it.
        error: why there is no result; the other fields are not set then.
    """

    model: str
    family: str
    input: int = 0
    norms_before: int = 0
    norms_after: int = 0
    norms_never: int = 0
    branches_before: int = 0
    branches_after: int = 0
    scales_before: int = 0
    scales_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    params_before: int = 0
    params_after: int = 0
    error64: float = 0.0
    error32: float = 0.0
    baseline32: float = 0.0
    other_sizes: tuple[tuple[int, int], ...] = ()
    kept: dict[str, int] = field(default_factory=dict)
    unexplained: int = 0
    changed_again: int = 0
    cpu_seconds: float = 0.0
    peak_mb: float | None = None
    float64_mb: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with the fold, or nothing."""
        if self.error:
            return self.error
        problems = []
        if not self.error64 <= _TOLERANCE_64:
            problems.append(f"differs by {self.error64:.1e} in float64")
        if not self.error32 <= _TOLERANCE_32:
            problems.append(
                f"differs by {self.error32:.1e} in float32 (unfolded: {self.baseline32:.1e})"
            )
        if self.unexplained:
            problems.append(f"{self.unexplained} norms stay without a reason")
        if self.changed_again:
            problems.append(f"folding again changes {self.changed_again} modules")
        return "; ".join(problems)


def fold_one(name: str) -> FoldRow:
    """Fold one model with random norms and compare all it returns.

    Args:
        name: of the model, as in `zoo_models`.

    Returns:
        The result; its `error` holds whatever exception was raised on the way.
    """
    begin = time.monotonic()
    try:
        row = _fold_one(name)
    except Exception as error:
        # One model must not end a run over a thousand, whatever it raises.
        why = " ".join(str(error).split())[:300]
        row = {"error": f"{type(error).__name__}: {why}"}
    seconds = round(time.monotonic() - begin, 1)
    return FoldRow(model=name, family=family_of(name), seconds=seconds, **row)


def _fold_one(name: str) -> dict[str, Any]:
    model, side = _settled_model(name)
    inputs = example_inputs(name, 2, side, side)
    model64, inputs64 = copy.deepcopy(model).double(), _float64(inputs)
    (folded64, report), cost = measured(lambda: fold(model64, inputs64))
    folded = copy.deepcopy(folded64).float()
    with torch.no_grad():
        with exact_arithmetic():
            others = dict(_taken_inputs(name, model64, side))
            given = [inputs64, _float64(example_inputs(name, 1, side, side)), *others.values()]
            error64 = max(_error64(model64, folded64, x) for x in given)
            exact = _run(model64, inputs64)[1]
        baseline32 = difference(exact, _run(model, inputs)[1]).max_rel
        error32 = difference(exact, _run(folded, inputs)[1]).max_rel
    again = fold(folded, example_inputs(name, 1, side, side))[1]
    left = {path: module for path, module in folded.named_modules() if is_norm(module)}
    return {
        "input": side,
        **_counts(report),
        "norms_never": sum(why_not_linear(norm) is not None for norm in left.values()),
        "error64": error64,
        "error32": error32,
        "baseline32": baseline32,
        "other_sizes": tuple(others),
        "kept": _reasons(model, report),
        "unexplained": len(left.keys() - {step.name for step in report.kept}),
        "changed_again": len(again.folded),
        "cpu_seconds": cost.cpu_seconds,
        "peak_mb": cost.peak_mb,
        "float64_mb": round(sum(t.nbytes for t in model64.state_dict().values()) / 1e6, 1),
    }


def _settled_model(name: str) -> tuple[nn.Module, int]:
    """Return the model with its norms settled, and the input side for which that worked."""
    sides = input_sizes(name)
    for side in sides:
        model = build_model(name, side)
        try:
            settle_norms(model, *example_inputs(name, 2, side, side), seed=side)
            return model, side
        except (RuntimeError, AssertionError, ValueError):
            if side == sides[-1]:
                raise
    raise AssertionError("there is always a side to try")


def _taken_inputs(
    name: str, model64: nn.Module, side: int
) -> Iterator[tuple[tuple[int, int], tuple[Any, ...]]]:
    """Yield the other sizes that a model takes, and inputs of them."""
    for taller, wider in _OTHER_SIZES:
        inputs = _float64(example_inputs(name, 1, side + taller, side + wider))
        try:
            model64(*copied(inputs))
        except Exception:
            # A model may reject a size with any exception.
            continue
        yield (side + taller, side + wider), inputs


def _float64(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map(Tensor.double, inputs)


def _run(model: Any, inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return all tensors that a model returns, and a detector's feature maps, else the same."""
    if not isinstance(inputs[0], list):
        returned = tensors_in(model(*copied(inputs)))
        return returned, returned
    maps: list[Tensor] = []
    hook = model.backbone.register_forward_hook(lambda *args: maps.extend(tensors_in(args[-1])))
    try:
        return tensors_in(model(*copied(inputs))), maps
    finally:
        hook.remove()


def _error64(model64: nn.Module, folded64: nn.Module, inputs: tuple[Any, ...]) -> float:
    pairs = zip(_run(model64, inputs), _run(folded64, inputs), strict=True)
    return max(difference(expected, found).max_rel for expected, found in pairs)


def _counts(report: FoldReport) -> dict[str, int]:
    names = [
        f"{what}_{when}"
        for what in ("norms", "branches", "scales", "macs", "params")
        for when in ("before", "after")
    ]
    return {name: getattr(report, name) for name in names}


def _reasons(model: nn.Module, report: FoldReport) -> dict[str, int]:
    """Count the reasons, with the names of modules left out."""
    names = {name for name, _ in model.named_modules() if not name.isalpha()}

    def general(detail: str) -> str:
        return re.sub(r"\w[\w.]*\w", lambda m: "..." if m[0] in names else m[0], detail)

    return dict(Counter(general(step.detail) for step in report.kept).most_common())
