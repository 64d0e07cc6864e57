"""The error of a difference between two experiments, and the distribution it has.

Each experiment is trained with a few seeds, and all runs are evaluated on the same images. The
difference of two means over seeds is wrong for two reasons, which are estimated each on its own:

- The test images are a sample. They are the same for both experiments, so this is a paired
  bootstrap: images are drawn with replacement, and the difference is computed anew for each draw
  (Efron & Tibshirani, An Introduction to the Bootstrap, 1993). In part these differences vary
  because every run has its own luck with every image. That part is within the spread between
  seeds already and is taken out again, lest it count twice: Owen (The pigeonhole bootstrap, 2007)
  shows that resampling rows and columns of a crossed design counts it three times.
- The seeds are a sample, and a tiny one. A bootstrap over three seeds would be far too sure of
  itself: its variance is 2/3 of what it should be and its quantiles know nothing of how uncertain
  that is (Hesterberg, What teachers should know about the bootstrap, 2015, section 4.3). So the
  variance between seeds is the unbiased one (n - 1), and this part of the error has Student's t
  distribution with the degrees of freedom of Welch (1947) and Satterthwaite (1946), which allow
  the two experiments to vary differently. Runs of two experiments with one seed are not taken as
  a pair: what they have in common is the order of images, which makes them no more alike.

The error is the sum of both parts: a normal and a Student variable, independent of each other. One
t distribution for the sum, its degrees of freedom by Welch and Satterthwaite again, would be
simpler; with two seeds it is wrong twice as often as it says where both parts are alike in size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.special import ndtr

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclass(frozen=True)
class Error:
    """The distribution of an estimate's error, symmetric about 0.

    Attributes:
        image_variance: of the normal part.
        seed_variance: squared scale of Student's part.
        freedom: its degrees of freedom, at least 1.
    """

    image_variance: float
    seed_variance: float
    freedom: float

    def below(self, value: float) -> float:
        """Return the probability of an error below `value`; 1/2 at 0 whatever the variances."""
        if not self.image_variance + self.seed_variance:
            return 0.5 + 0.5 * np.sign(value)
        # Student's t is a normal variable whose variance is uncertain: freedom / chi2. For each
        # chi the sum is normal; chi's density is integrated over by Gauss-Legendre quadrature.
        middle = math.sqrt(self.freedom)
        low, high = max(0.0, middle - 9), middle + 9
        chi = low + (high - low) * (_NODES + 1) / 2
        log_density = (
            (self.freedom - 1) * np.log(chi)
            - chi**2 / 2
            - (self.freedom / 2 - 1) * math.log(2)
            - math.lgamma(self.freedom / 2)
        )
        weights = np.exp(log_density) * _NODE_WEIGHTS * (high - low) / 2
        deviation = np.sqrt(self.image_variance + self.seed_variance * self.freedom / chi**2)
        tails = ndtr(torch.from_numpy(-abs(value) / deviation)).numpy()
        tail = float(weights @ tails / weights.sum())
        return tail if value < 0 else 1 - tail

    def quantile(self, probability: float) -> float:
        """Return the value below which the error is with this probability."""
        if probability < 0.5:
            return -self.quantile(1 - probability)
        low, high = 0.0, math.sqrt(self.image_variance + self.seed_variance)
        while high and self.below(high) < probability:
            low, high = high, 2 * high
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.below(middle) < probability else (low, middle)
        return high


@dataclass(frozen=True)
class Scores:
    """A metric of one experiment's runs on the same images.

    Attributes:
        observed: (S,), of each seed, as fractions.
        resampled: (S, R), on R bootstrap draws of the images, the same for all experiments.
    """

    observed: np.ndarray
    resampled: np.ndarray

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(self.observed.mean())

    @property
    def seed_variance(self) -> float:
        """The unbiased variance of a run between seeds, on these images."""
        return float(self.observed.var(ddof=1))

    def first(self, seeds: int) -> Scores:
        """Return those of the first seeds alone."""
        return Scores(self.observed[:seeds], self.resampled[:seeds])


@dataclass(frozen=True)
class Difference:
    """How much higher an idea's metric is than the base's.

    Attributes:
        estimate: as a fraction.
        image_variance: of the estimate, due to the images alone.
        seed_variances: of a run, between seeds: of the base and of the idea.
        seeds: of each.
    """

    estimate: float
    image_variance: float
    seed_variances: tuple[float, float]
    seeds: int

    def error(self, seeds: int | None = None) -> Error:
        """Return the estimate's error, as it is or as it would be with another number of seeds."""
        n = seeds or self.seeds
        parts = [variance / n for variance in self.seed_variances]
        squares = sum(part**2 / (n - 1) for part in parts)
        freedom = sum(parts) ** 2 / squares if squares else 2.0 * (n - 1)
        return Error(self.image_variance, sum(parts), freedom)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return where the true difference is with this confidence."""
        half = self.error().quantile((1 + confidence) / 2)
        return self.estimate - half, self.estimate + half

    @property
    def helps(self) -> float:
        """The probability that the true difference is above 0.

        It is that of a flat prior: one minus the one-sided p-value.
        """
        return self.error().below(self.estimate)


def difference(base: Scores, idea: Scores) -> Difference:
    """Return an idea's difference from the base.

    Args:
        base: of at least two seeds.
        idea: of as many seeds, on the same draws of images.

    Raises:
        ValueError: a metric is NaN: the images have no object to find.
    """
    if np.isnan([base.mean, idea.mean]).any():
        raise ValueError("a metric is NaN, as images without objects to find have it")
    seeds = len(base.observed)
    draws = idea.resampled.mean(axis=0) - base.resampled.mean(axis=0)  # (R,)
    luck = sum(_own_luck(scores) for scores in (base, idea)) / seeds
    return Difference(
        estimate=idea.mean - base.mean,
        image_variance=max(0.0, float(np.nanvar(draws, ddof=1)) - luck),
        seed_variances=(base.seed_variance, idea.seed_variance),
        seeds=seeds,
    )


def _own_luck(scores: Scores) -> float:
    """Return the variance that a single run's own luck with the images gives its metric."""
    deviations = scores.resampled - scores.observed[:, None]
    return float(np.nanmean(deviations.var(axis=0, ddof=1)))
