"""From a difference and its uncertainty to a verdict: better, worse, or how many more seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tinydet.comparison.uncertainty import Difference

MOST_SEEDS = 100  # more are not worth suggesting
_POWER = 0.8  # probability of a verdict after the suggested number of seeds


@dataclass(frozen=True)
class Verdict:
    """The verdict on an idea.

    Attributes:
        kind: "the same" means identical detections; "dropped" is decided by `--halving`.
        reason: the rest of the sentence.
        more_seeds: how many more would probably be enough, if the verdict is open.
    """

    kind: Literal["better", "worse", "can't tell yet", "the same", "dropped"]
    reason: str
    more_seeds: int | None = None

    def line(self) -> str:
        """Return the verdict as a sentence."""
        return f"{self.kind}: {self.reason}"


def decide(
    found: Difference, confidence: float, ideas: int
) -> tuple[Literal["better", "worse", "can't tell yet"], float, float]:
    """Return the verdict on an idea, and the interval it rests on.

    The verdict is "better" or "worse" if the interval excludes 0. With several ideas, each gets an
    interval of a higher confidence, so that all of them together hold with the requested
    confidence (Bonferroni): the more ideas are tried, the more likely one looks good by chance.
    Holm's procedure would be slightly more powerful, but its intervals do not match its verdicts.

    Args:
        found: the difference from the base.
        confidence: probability that no verdict of this comparison is wrong, such as 0.95.
        ideas: number of ideas compared with the base, including those dropped early.
    """
    low, high = found.interval(single_confidence(confidence, ideas))
    return "better" if low > 0 else "worse" if high < 0 else "can't tell yet", low, high


def make_verdict(found: Difference, confidence: float, ideas: int, metric: str) -> Verdict:
    """Return the verdict of `decide` with its reason, and the seeds needed if it is open.

    Args:
        found: the difference from the base.
        confidence: probability that no verdict of this comparison is wrong.
        ideas: number of ideas compared with the base.
        metric: name of the metric.
    """
    kind, low, high = decide(found, confidence, ideas)
    if kind != "can't tell yet":
        return Verdict(kind, f"{metric} {_points(low)} to {_points(high)} points")
    single = single_confidence(confidence, ideas)
    more = _more_seeds(found, single)
    limit = replace(found.error(), seed_variance=0.0).quantile((1 + single) / 2)
    if more is not None:
        reason = (
            f"about {more} more seed{'s'[: more > 1]} needed if the true difference is the "
            f"observed {_points(found.estimate)} points"
        )
    elif limit >= abs(found.estimate) > 0:
        reason = (
            "more seeds would not help, the choice of test images alone leaves "
            f"±{100 * limit:.1f} points of uncertainty"
        )
    else:
        reason = f"{MOST_SEEDS} seeds would not be enough, the difference is small if there is any"
    reason += f"; {metric} {_points(low)} to {_points(high)} points"
    return Verdict(kind, reason, more)


def single_confidence(confidence: float, ideas: int) -> float:
    """Return the confidence of each interval, so that all together hold with `confidence`."""
    return 1 - (1 - confidence) / ideas


def _more_seeds(found: Difference, confidence: float) -> int | None:
    """Return how many more seeds give a verdict with probability `_POWER`; None if too many."""

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


def should_prune(found: Difference, confidence: float, looks: int) -> bool:
    """Return whether to drop an idea before all seeds are trained.

    It is dropped if it does not help with `confidence`, which is shared among the interim looks: at
    most `1 - confidence` of the ideas that do help are ever dropped. "better" is only decided after
    the last seed, so that pruning can only make it rarer.

    Args:
        found: the difference after the seeds so far.
        confidence: such as 0.95.
        looks: number of interim looks.
    """
    return found.helps <= (1 - confidence) / looks


def interim_looks(seeds: int) -> list[int]:
    """Return after how many seeds ideas may be dropped, before the last one: 2, 4, 8, ..."""
    return [2**k for k in range(1, seeds.bit_length()) if 2**k < seeds]
