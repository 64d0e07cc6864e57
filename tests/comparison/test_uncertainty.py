"""The error's distribution against closed forms and drawn numbers; differences against designs."""

import math

import numpy as np
import pytest

from tinydet.comparison.uncertainty import Difference, Error, Scores, difference


@pytest.mark.parametrize("value", [-30.0, -2.0, -0.1, 0.0, 0.7, 12.706])
def test_without_image_variance_it_is_students_t(value):
    one, two = 0.5 + math.atan(value) / math.pi, 0.5 + value / (2 * math.sqrt(2 + value**2))
    assert Error(0, 1, 1).below(value) == pytest.approx(one, abs=1e-9)
    assert Error(0, 4, 2).below(2 * value) == pytest.approx(two, abs=1e-9)


def test_quantiles_are_those_of_the_tables():
    # Student's t for 95 % two-sided, from any textbook; the last is the normal one.
    for dof, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (1e7, 1.960)):
        assert Error(0, 1, dof).quantile(0.975) == pytest.approx(expected, abs=1e-3)
        assert Error(0, 1, dof).quantile(0.025) == pytest.approx(-expected, abs=1e-3)
    assert Error(9, 0, 1).quantile(0.975) == pytest.approx(3 * 1.959964, rel=1e-5)


def test_the_sum_of_a_normal_and_a_student_variable():
    rng = np.random.default_rng(0)
    error = Error(0.5, 2.0, 3.3)
    normal, chi2 = rng.normal(size=400_000), rng.chisquare(3.3, 400_000)
    student = rng.normal(size=400_000) / np.sqrt(chi2 / 3.3)
    drawn = math.sqrt(0.5) * normal + math.sqrt(2.0) * student
    for value in (-6.0, -1.0, 0.5, 3.0):
        assert error.below(value) == pytest.approx((drawn < value).mean(), abs=0.003)
    assert error.below(error.quantile(0.9)) == pytest.approx(0.9, abs=1e-5)


def test_the_sum_of_two_student_variables():
    rng = np.random.default_rng(0)
    error = Error(0.5, 2.0, 3.3, 2)
    of_images, of_seeds = (rng.standard_t(dof, 400_000) for dof in (2, 3.3))
    drawn = math.sqrt(0.5) * of_images + math.sqrt(2.0) * of_seeds
    for value in (-6.0, -1.0, 0.5, 3.0):
        assert error.below(value) == pytest.approx((drawn < value).mean(), abs=0.003)
    # Each part alone is the same distribution.
    assert Error(2, 0, 1, 7).below(3) == pytest.approx(Error(0, 2, 7).below(3), abs=1e-12)


def _wrong_verdicts(images, seeds=3, comparisons=1000):
    """Share of comparisons without an effect whose interval of 95 % leaves out 0.

    Scores are means over images of what differs between images, networks, runs and seeds.
    """
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(comparisons):
        draws = rng.multinomial(images, np.full(images, 1 / images), size=200) / images
        of_images, scores = rng.normal(0, 0.3, images), []
        for _ in range(2):
            taste = rng.normal(0, 0.15, images)
            luck = rng.normal(0, 0.05, (seeds, images)) + rng.normal(0, 0.01, (seeds, 1))
            values = of_images + taste + luck
            scores.append(Scores(values.mean(axis=1), values @ draws.T))
        found = difference(*scores, images)
        wrong += found.error().below(abs(found.estimate)) > 0.975
    return wrong / comparisons


@pytest.mark.parametrize("images", [3, 8, 60])
def test_few_images_do_not_make_more_verdicts_wrong(images):
    # Binomial(1000, 0.05) is above 67 with probability 0.007.
    assert 0.01 < _wrong_verdicts(images) <= 0.067


def test_no_variance_at_all():
    certain = Error(0, 0, 2)
    assert [certain.below(value) for value in (-1e-9, 0, 1e-9)] == [0, 0.5, 1]
    assert certain.quantile(0.975) == 0


def _drawn(rng, seeds, shared, own, seed, draws=4000, images=60):
    """Scores that are means over images: of a part that all runs share, and of each run's own."""
    values = shared + own * rng.normal(size=(seeds, images)) + seed * rng.normal(size=(seeds, 1))
    weights = rng.multinomial(images, np.full(images, 1 / images), size=draws) / images
    return values, weights


def test_image_variance_leaves_out_what_all_runs_share_and_what_each_has_alone():
    rng = np.random.default_rng(1)
    shared, effect = 5 * rng.normal(size=2000), 1.5 * rng.normal(size=2000)
    base, weights = _drawn(rng, 4, shared, 1.0, 0.0, draws=2000, images=2000)
    idea, _ = _drawn(rng, 4, shared + effect, 1.0, 0.0, draws=1, images=2000)
    found = difference(*(Scores(v.mean(axis=1), v @ weights.T) for v in (base, idea)), 2000)
    # What is left is the effect's own spread over images.
    assert found.image_variance == pytest.approx(1.5**2 / 2000, rel=0.15)
    assert found.estimate == pytest.approx(idea.mean() - base.mean())


def test_welchs_numbers():
    base = Scores(np.array([1.0, 2.0, 3.0]), np.zeros((3, 2)) + np.array([[1.0], [2], [3]]))
    idea = Scores(np.array([4.0, 8.0, 12.0]), np.zeros((3, 2)) + np.array([[4.0], [8], [12]]))
    found = difference(base, idea, 60)
    assert (found.estimate, found.image_variance) == (6.0, 0.0)
    assert found.seed_variances == (1.0, 16.0)
    error = found.error()
    assert error.seed_variance == pytest.approx(17 / 3)
    # R: t.test(c(4, 8, 12), c(1, 2, 3)): df = 2.2490, interval -3.226 to 15.226
    assert error.dof == pytest.approx((17 / 3) ** 2 / ((1 / 9 + 256 / 9) / 2))
    assert found.error(6).seed_variance == pytest.approx(17 / 6)
    assert found.error(6).dof == pytest.approx(error.dof * 5 / 2)


def test_a_bootstrap_over_three_seeds_would_be_too_narrow():
    rng = np.random.default_rng(3)
    base, idea = (Scores(rng.normal(size=3), np.zeros((3, 2))) for _ in range(2))
    low, high = Difference(0.0, 0.0, (base.seed_variance, idea.seed_variance), 3, 60).interval(0.95)
    drawn = [
        rng.choice(idea.observed, 3).mean() - rng.choice(base.observed, 3).mean()
        for _ in range(4000)
    ]
    naive = np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025)
    assert high - low > 1.6 * naive


def test_the_chance_to_help_belongs_to_the_interval():
    found = Difference(1.0, 0.2, (0.3, 0.4), 3, 60)
    confidence = 2 * found.helps - 1  # two-sided
    assert found.interval(confidence)[0] == pytest.approx(0, abs=1e-4)
    assert Difference(-1.0, 0.2, (0.3, 0.4), 3, 60).helps == pytest.approx(1 - found.helps)


@pytest.mark.filterwarnings("error")
def test_a_metric_without_a_value_is_refused():
    known = Scores(np.array([0.5, 0.6]), np.full((2, 100), 0.5))
    unknown = Scores(np.full(2, np.nan), np.full((2, 100), np.nan))
    for pair in ((known, unknown), (unknown, known), (unknown, unknown)):
        with pytest.raises(ValueError, match="a metric is NaN"):
            difference(*pair, 60)


@pytest.mark.filterwarnings("error")
def test_draws_without_objects_are_left_out():
    rng = np.random.default_rng(0)
    base, idea = (Scores(rng.random(3), rng.random((3, 200))) for _ in range(2))
    expected = difference(base, idea, 60)
    gap = np.full((3, 5), np.nan)
    holed = [Scores(s.observed, np.concatenate([gap, s.resampled], axis=1)) for s in (base, idea)]
    assert difference(*holed, 60) == expected
