"""From a difference and its uncertainty to a verdict: better, worse, or how much is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tinydet.comparison.uncertainty import Difference, Error

MOST_SEEDS = 100  # that anybody would train
_POWER = 0.8  # chance of a verdict after the seeds that are said to be missing


@dataclass(frozen=True)
class Verdict:
    """What can be said of an idea.

    Attributes:
        kind: "same" is found by comparing detections, and "dropped" by `halving`.
        low: lower end of the interval that decides.
        high: its upper end.
        reason: the rest of the sentence.
        more_seeds: how many would probably tell, where it cannot be told yet.
    """

    kind: Literal["better", "worse", "can't tell yet", "the same", "dropped"]
    low: float
    high: float
    reason: str
    more_seeds: int | None = None

    def line(self) -> str:
        """Return the verdict as a sentence."""
        return f"{self.kind}: {self.reason}"


def decide(
    found: Difference, confidence: float, ideas: int
) -> tuple[Literal["better", "worse", "can't tell yet"], float, float]:
    """Return the verdict on an idea, and the interval it rests on.

    "better" and "worse" are said where the interval leaves out 0. Of several ideas judged at once
    each gets an interval of a higher confidence, so that all of them together hold with the
    confidence asked for (Bonferroni): the more ideas are tried, the likelier one looks good by
    chance. Holm's steps would give the second best idea a little more, and intervals that do not
    match the verdicts.

    Args:
        found: the difference from the base.
        confidence: that no verdict of this comparison is wrong, such as 0.95.
        ideas: that are compared with the base, those dropped on the way included.
    """
    low, high = found.interval(_single(confidence, ideas))
    return "better" if low > 0 else "worse" if high < 0 else "can't tell yet", low, high


def judge(found: Difference, confidence: float, ideas: int, metric: str) -> Verdict:
    """Return the verdict of `decide` with its reason, and what it would take where it is open.

    Args:
        found: the difference from the base.
        confidence: that no verdict of this comparison is wrong.
        ideas: that are compared with the base.
        metric: its name.
    """
    kind, low, high = decide(found, confidence, ideas)
    if kind != "can't tell yet":
        return Verdict(kind, low, high, f"{metric} {_points(low)} to {_points(high)} points")
    single = _single(confidence, ideas)
    more = _more_seeds(found, single)
    limit = Error(found.image_variance, 0.0, 1.0).quantile((1 + single) / 2)
    if more is not None:
        reason = (
            f"about {more} more seed{'s'[: more > 1]}, if the difference is the "
            f"{_points(found.estimate)} points it looks"
        )
    elif limit >= abs(found.estimate) > 0:
        reason = (
            "more seeds would not tell either, these test images alone leave "
            f"±{100 * limit:.1f} points open"
        )
    else:
        reason = f"{MOST_SEEDS} seeds would not, the difference is small if there is one"
    reason += f"; it is between {_points(low)} and {_points(high)} points"
    return Verdict(kind, low, high, reason, more)


def _single(confidence: float, ideas: int) -> float:
    """Return the confidence of each of several intervals that hold together with `confidence`."""
    return 1 - (1 - confidence) / ideas


def _more_seeds(found: Difference, confidence: float) -> int | None:
    """Return how many more seeds give a verdict with probability `_POWER`, None if too many."""

    def enough(seeds: int) -> bool:
        error = found.error(seeds)
        rest = abs(found.estimate) - error.quantile((1 + confidence) / 2)
        return rest > 0 and error.below(rest) >= _POWER

    if not found.estimate or not enough(MOST_SEEDS):
        return None
    low, high = found.seeds, MOST_SEEDS  # Too few, enough.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high - found.seeds


def _points(fraction: float) -> str:
    """Return a difference in percentage points, with its sign."""
    points = 100 * fraction
    return f"{points:+.{1 if abs(points) >= 0.1 or not math.isfinite(points) else 2}f}"


def hopeless(found: Difference, confidence: float, looks: int) -> bool:
    """Whether an idea may be dropped before all seeds are trained.

    It is where it does not help with `confidence`, shared among the looks: of ideas that do help,
    at most `1 - confidence` are ever dropped. "better" is said after the last seed alone, so
    that dropping ideas can only make it rarer.

    Args:
        found: the difference after the seeds so far.
        confidence: such as 0.95.
        looks: how often an idea is looked at before its last seed.
    """
    return found.helps <= (1 - confidence) / looks


def looks_of(seeds: int) -> list[int]:
    """Return after how many seeds ideas are looked at before the last: 2, 4, 8, ..."""
    return [2**k for k in range(1, seeds.bit_length()) if 2**k < seeds]
