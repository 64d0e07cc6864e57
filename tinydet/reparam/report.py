"""The outcome of a fold: what was folded and what remains, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass

from tinydet.reparam.weight_ranges import WeightRange


@dataclass(frozen=True)
class Step:
    """One module that was folded or kept.

    Attributes:
        name: the module's qualified name in the model.
        detail: what it was folded into, or why it remains.
    """

    name: str
    detail: str


@dataclass(frozen=True)
class FoldReport:
    """The outcome of folding a model.

    Attributes:
        folded: merged branches, folded norms and factors, in order.
        kept: parallel branches and normalization layers that remain, with the reason.
        norms_before: normalization layers in the model.
        norms_after: normalization layers in the folded model.
        params_before: parameters in the model.
        params_after: parameters in the folded model.
        macs_before: multiply-adds of the example's forward pass.
        macs_after: the same, folded.
        branches_before: additions of parallel linear branches with a common input.
        branches_after: the same, folded.
        scales_before: multiplications of a conv's or linear layer's output by one number for each
            channel.
        scales_after: the same, folded.
        max_rel: largest difference between the outputs in float64, as a fraction of the largest
            absolute output.
        ranges_before: see `weight_ranges`; a layer that was not replaced has the same name in both.
        ranges_after: the same, folded.
    """

    folded: tuple[Step, ...]
    kept: tuple[Step, ...]
    norms_before: int
    norms_after: int
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    branches_before: int
    branches_after: int
    scales_before: int
    scales_after: int
    max_rel: float
    ranges_before: tuple[WeightRange, ...]
    ranges_after: tuple[WeightRange, ...]

    def lines(self) -> list[str]:
        """Return the report as lines of text: a summary, then one line for each kept module."""
        summary = [
            f"norms       {self.norms_before} -> {self.norms_after}",
            f"branches    {self.branches_before} -> {self.branches_after}",
            f"factors     {self.scales_before} -> {self.scales_after}",
            f"mult-adds   {self.macs_before:,} -> {self.macs_after:,} for the example input",
            f"parameters  {self.params_before:,} -> {self.params_after:,}",
            f"folded      {len(self.folded)} modules",
            f"difference  {self.max_rel:.1e} of the largest output, in float64",
        ]
        return summary + [f"kept        {step.name}: {step.detail}" for step in self.kept]

    def ranges_line(self) -> str:
        """Return the most uneven weight of the folded network as a line; see `weight_ranges`."""
        worst = max(self.ranges_after, key=lambda found: found.spread, default=None)
        if worst is None:
            return "ranges      no weights"
        before = "".join(
            f", {found.spread:.1f} before"
            for found in self.ranges_before
            if found.name == worst.name
        )
        where = worst.name or "the model"
        return f"ranges      largest channel {worst.spread:.1f} times the median in {where}{before}"
