"""One timm model folded, and compared with the original by every feature map it returns.

The folded and the unfolded network are compared in float64, on another batch size and another input
size as well. Both are also run in float32 and compared with the unfolded one in float64: the
unfolded network's own float32 error is the baseline for the folded one's.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm_models import (
    build_model,
    example_images,
    family_of,
    input_sizes,
    settle_norms,
)
from torch import Tensor, nn

from tinydet.reparam.exact import exact_arithmetic
from tinydet.reparam.fold import fold
from tinydet.reparam.norms import is_norm, why_not_linear
from tinydet.reparam.report import FoldReport
from tinydet.reparam.verify import compare_outputs, difference

_TOLERANCE_64 = 1e-9
_TOLERANCE_32 = 1e-4


@dataclass(frozen=True)
class FoldRow:
    """The outcome of folding one model.

    Errors are the largest difference in a feature map as a fraction of its largest value.

    Attributes:
        model: timm's name of it.
        family: the timm module that defines it.
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
        other_size: (height, width) of the other input the two were compared on; None if the
            unfolded model does not take it.
        kept: the reasons of the norms that remain, and how many norms each applies to.
        unexplained: norms that remain without a reason.
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
    other_size: tuple[int, int] | None = None
    kept: dict[str, int] = field(default_factory=dict)
    unexplained: int = 0
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
        return "; ".join(problems)


def fold_one(name: str) -> FoldRow:
    """Fold one of timm's models with random norms and compare all its feature maps.

    Args:
        name: timm's name of the model.

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
    images = example_images(name, 2, side, side)
    model64 = copy.deepcopy(model).double()
    folded64, report = fold(model64, images.double())
    folded = copy.deepcopy(folded64).float()
    other = (side + 32, side + 64)
    with torch.no_grad():
        with exact_arithmetic():
            expected = model64(images.double())
            error64 = difference(expected, folded64(images.double())).max_rel
            takes_other = _runs(model64, example_images(name, 1, *other).double())
            inputs = [example_images(name, 1, side, side)]
            inputs += [example_images(name, 1, *other)] if takes_other else []
            error64 = max(
                error64, compare_outputs(model64, folded64, [x.double() for x in inputs]).max_rel
            )
        baseline32 = difference(expected, model(images)).max_rel
        error32 = difference(expected, folded(images)).max_rel
    left = {path: module for path, module in folded.named_modules() if is_norm(module)}
    return {
        "input": side,
        **_counts(report),
        "norms_never": sum(why_not_linear(norm) is not None for norm in left.values()),
        "error64": error64,
        "error32": error32,
        "baseline32": baseline32,
        "other_size": other if takes_other else None,
        "kept": _reasons(model, report),
        "unexplained": len(left.keys() - {step.name for step in report.kept}),
    }


def _settled_model(name: str) -> tuple[nn.Module, int]:
    """Return the model with its norms settled, and the input side for which that worked."""
    sides = input_sizes(name)
    for side in sides:
        model = build_model(name)
        try:
            settle_norms(model, example_images(name, 2, side, side), seed=side)
            return model, side
        except (RuntimeError, AssertionError, ValueError):
            if side == sides[-1]:
                raise
    raise AssertionError("there is always a side to try")


def _runs(model: Callable[[Tensor], object], images: Tensor) -> bool:
    try:
        model(images)
    except (RuntimeError, AssertionError, ValueError, IndexError):
        return False
    return True


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
