"""The difference between two experiments, and the distribution of its error.

Each experiment is trained with a few seeds, and all runs are evaluated on the same images. The
difference of the two means over seeds has two sources of error, which are estimated separately:

- The test images are a sample. They are the same for both experiments, so this part comes from a
  paired bootstrap: images are drawn with replacement, and the difference is computed again for
  each draw (Efron & Tibshirani, An Introduction to the Bootstrap, 1993). Part of its variance comes
  from chance differences between runs on the same image. The variance between seeds already
  contains that part, so it is subtracted here: Owen (The pigeonhole bootstrap, 2007) shows that
  resampling both rows and columns of a crossed design counts it three times. A bootstrap's variance
  over I images is (I - 1) / I of the unbiased one, which matters with few images, as does that I
  images tell their variance with I - 1 degrees of freedom only: this part has Student's t
  distribution too.
- The seeds are a sample, and a tiny one. A bootstrap over three seeds would be overconfident: its
  variance is 2/3 of the true one, and its quantiles ignore how uncertain the variance itself is
  (Hesterberg, What teachers should know about the bootstrap, 2015, section 4.3). So the variance
  between seeds is the unbiased estimate (n - 1), and this part of the error has Student's t
  distribution with the degrees of freedom of Welch (1947) and Satterthwaite (1946), which allow
  the two experiments to have different variances. Runs of two experiments with the same seed are
  not treated as pairs: they share only the order of images, which does not correlate their scores.

The error is the sum of two Student variables, independent of each other. A single t distribution
for the sum, with degrees of freedom by Welch and Satterthwaite again, would be simpler; with two
seeds and parts of similar size, its error rate is twice the nominal one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.special import ndtr

FEWEST_IMAGES = 3  # with two, verdicts are wrong twice as often as they may be
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(100)


@dataclass(frozen=True)
class Error:
    """The distribution of an estimate's error, symmetric about 0: a sum of two Student variables.

    Attributes:
        image_variance: squared scale of the part due to the choice of images.
        seed_variance: squared scale of the part due to the seeds.
        dof: degrees of freedom of the seeds' part, at least 1.
        image_dof: degrees of freedom of the images' part, at least 1; infinite: it is normal.
    """

    image_variance: float
    seed_variance: float
    dof: float
    image_dof: float = math.inf

    def below(self, value: float) -> float:
        """Return the probability that the error is below `value`; 1/2 at 0."""
        if not self.image_variance + self.seed_variance:
            return 0.5 + 0.5 * np.sign(value)
        # Given both uncertain variances, the sum is normal.
        of_images, image_weights = _student_variances(self.image_variance, self.image_dof)
        of_seeds, seed_weights = _student_variances(self.seed_variance, self.dof)
        deviation = np.sqrt(of_images[:, None] + of_seeds)
        tails = ndtr(torch.from_numpy(-abs(value) / deviation)).numpy()
        tail = float(image_weights @ tails @ seed_weights)
        return tail if value < 0 else 1 - tail

    def quantile(self, probability: float) -> float:
        """Return the value that the error is below with this probability."""
        if probability < 0.5:
            return -self.quantile(1 - probability)
        low, high = 0.0, math.sqrt(self.image_variance + self.seed_variance)
        while high and self.below(high) < probability:
            low, high = high, 2 * high
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.below(middle) < probability else (low, middle)
        return high


def _student_variances(variance: float, dof: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the variances of the normal variables that a Student variable mixes, and their shares.

    Student's t is a normal variable whose variance is uncertain: dof / chi2. The density of chi is
    integrated over by Gauss-Legendre quadrature.
    """
    if not variance or math.isinf(dof):
        return np.array([variance]), np.ones(1)
    middle = math.sqrt(dof)
    low, high = max(0.0, middle - 9), middle + 9
    chi = low + (high - low) * (_NODES + 1) / 2
    log_density = (dof - 1) * np.log(chi) - chi**2 / 2
    weights = np.exp(log_density - log_density.max()) * _NODE_WEIGHTS
    return variance * dof / chi**2, weights / weights.sum()


@dataclass(frozen=True)
class Scores:
    """A metric of one experiment's runs on the same images.

    Attributes:
        observed: (S,) value for each seed, as fractions.
        resampled: (S, R) values on R bootstrap draws of the images; all experiments have the same
            draws.
    """

    observed: np.ndarray
    resampled: np.ndarray

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(self.observed.mean())

    @property
    def seed_variance(self) -> float:
        """The unbiased variance between seeds, on these images."""
        return float(self.observed.var(ddof=1))

    def first(self, seeds: int) -> Scores:
        """Return the scores of the first seeds only."""
        return Scores(self.observed[:seeds], self.resampled[:seeds])


@dataclass(frozen=True)
class Difference:
    """How much higher an idea's metric is than the base's.

    Attributes:
        estimate: as a fraction.
        image_variance: variance of the estimate that is due to the choice of images.
        seed_variances: variance between seeds of a single run: of the base and of the idea.
        seeds: number of seeds of each.
        images: number of test images.
    """

    estimate: float
    image_variance: float
    seed_variances: tuple[float, float]
    seeds: int
    images: int

    def error(self, seeds: int | None = None) -> Error:
        """Return the error of the estimate, or the one expected with another number of seeds."""
        n = seeds or self.seeds
        parts = [variance / n for variance in self.seed_variances]
        squares = sum(part**2 / (n - 1) for part in parts)
        dof = sum(parts) ** 2 / squares if squares else 2.0 * (n - 1)
        return Error(self.image_variance, sum(parts), dof, self.images - 1)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the confidence interval of the true difference."""
        half = self.error().quantile((1 + confidence) / 2)
        return self.estimate - half, self.estimate + half

    @property
    def helps(self) -> float:
        """The probability that the true difference is above 0, given a flat prior.

        It is one minus the one-sided p-value.
        """
        return self.error().below(self.estimate)


def difference(base: Scores, idea: Scores, images: int) -> Difference:
    """Return an idea's difference from the base.

    Args:
        base: scores of at least two seeds.
        idea: scores of as many seeds, on the same draws of images.
        images: number of test images, at least `FEWEST_IMAGES`.

    Raises:
        ValueError: a metric is NaN, because the images have no object to find.
    """
    if np.isnan([base.mean, idea.mean]).any():
        raise ValueError("a metric is NaN: the test images have no object to find")
    seeds = len(base.observed)
    unbiased = images / (images - 1)
    draws = idea.resampled.mean(axis=0) - base.resampled.mean(axis=0)  # (R,)
    within = sum(within_run_variance(scores) for scores in (base, idea)) / seeds
    return Difference(
        estimate=idea.mean - base.mean,
        image_variance=unbiased * max(0.0, float(np.nanvar(draws, ddof=1)) - within),
        seed_variances=(base.seed_variance, idea.seed_variance),
        seeds=seeds,
        images=images,
    )


def within_run_variance(scores: Scores) -> float:
    """Return the variance over image draws of what a single run has and its experiment has not."""
    deviations = scores.resampled - scores.observed[:, None]
    return float(np.nanmean(deviations.var(axis=0, ddof=1)))
