import numpy as np
import pytest

from tinydet.comparison.uncertainty import Difference, difference
from tinydet.comparison.verdict import decide, interim_looks, make_verdict, should_prune
from tinydet.evaluation.weighted import voc_matches, weighted_area_ap

from .simulated import (
    World,
    as_detections,
    as_matches,
    draw_comparison,
    draw_run,
    draw_scene,
)


def _difference(points, image=0.0, seed=0.005, seeds=3, images=60):
    return Difference(points / 100, image**2, (seed**2, seed**2), seeds, images)


def test_better_and_worse_are_said_where_the_interval_leaves_out_0():
    better = make_verdict(_difference(4), 0.95, 1, "AP50")
    assert (better.kind, better.more_seeds) == ("better", None)
    low, high = _difference(4).interval(0.95)
    assert better.line() == f"better: AP50 {100 * low:+.1f} to {100 * high:+.1f} points"
    worse = make_verdict(_difference(-4), 0.95, 1, "AP")
    assert worse.kind == "worse"
    assert worse.line() == f"worse: AP {-100 * high:+.1f} to {-100 * low:+.1f} points"


def test_the_more_ideas_the_more_is_asked_of_each():
    found = _difference(1.3)
    assert make_verdict(found, 0.95, 1, "AP50").kind == "better"
    assert make_verdict(found, 0.95, 5, "AP50").kind == "can't tell yet"
    assert decide(found, 0.95, 5)[1:] == pytest.approx(found.interval(0.99))


def test_as_many_more_seeds_as_are_said_have_the_power_that_is_said():
    found = _difference(1.0, image=0.001, seed=0.008)
    verdict = make_verdict(found, 0.95, 1, "AP50")
    assert verdict.line().startswith(
        f"can't tell yet: about {verdict.more_seeds} more seeds needed if the true difference is "
        "the observed +1.0 points; AP50 -"
    )
    seeds = found.seeds + verdict.more_seeds
    rng = np.random.default_rng(0)
    told = {seeds: 0, seeds // 2: 0}
    for n in told:
        for _ in range(400):
            runs = rng.normal(0, 0.008, (2, n))
            estimate = 0.01 + rng.normal(0, 0.001) + runs[1].mean() - runs[0].mean()
            again = Difference(estimate, 0.001**2, tuple(runs.var(axis=1, ddof=1)), n, 60)
            told[n] += again.interval(0.95)[0] > 0
    assert 0.7 < told[seeds] / 400 < 0.9
    assert told[seeds // 2] / 400 < 0.6


def test_images_may_be_too_few_for_any_number_of_seeds():
    verdict = make_verdict(_difference(1.0, image=0.01), 0.95, 1, "AP50")
    assert verdict.more_seeds is None
    assert "the choice of test images alone leaves ±2.0 points" in verdict.reason


def test_a_difference_may_be_too_small_for_any_number_of_seeds():
    verdict = make_verdict(_difference(0.02), 0.95, 1, "AP50")
    assert verdict.more_seeds is None
    assert "100 seeds would not be enough, the difference is small" in verdict.reason


def test_no_difference_and_no_variance():
    verdict = make_verdict(Difference(0.0, 0.0, (0.0, 0.0), 3, 60), 0.95, 2, "AP50")
    assert verdict.kind == "can't tell yet"
    assert verdict.reason.endswith("; AP50 +0.00 to +0.00 points")


def test_looks_double():
    assert [interim_looks(n) for n in (2, 3, 4, 5, 9)] == [[], [2], [2], [2, 4], [2, 4, 8]]


def test_what_helps_is_rarely_dropped_and_what_harms_much_is_dropped():
    rng = np.random.default_rng(0)

    def dropped(effect):
        count = 0
        for _ in range(1000):
            runs = rng.normal(0, 0.01, (2, 4))
            looks = []
            for n in (2, 4):
                own = effect + runs[1, :n].mean() - runs[0, :n].mean()
                variances = tuple(runs[:, :n].var(axis=1, ddof=1))
                looks.append(should_prune(Difference(own, 0.0, variances, n, 60), 0.95, 2))
            count += any(looks)
        return count / 1000

    assert dropped(0.0) <= 0.05 + 0.014  # two standard errors
    assert dropped(-0.2) > 0.9


@pytest.mark.parametrize("alike", [1, 5])
def test_what_is_simulated_is_what_matching_finds(alike):
    world, rng = World(alike=alike), np.random.default_rng(0)
    scene = draw_scene(world, rng)
    run = draw_run(world, scene, 0.0, np.zeros(len(scene[0].labels)), rng)
    detections, truth = as_detections(world, scene, run)
    weights = rng.multinomial(60, np.full(60, 1 / 60), size=20)
    np.testing.assert_allclose(
        weighted_area_ap(as_matches(world, scene, run), weights),
        weighted_area_ap(voc_matches(detections, truth, world.classes), weights),
    )


@pytest.fixture(scope="module")
def comparisons():
    """150 simulated comparisons of a base, an idea without effect, and one that helps."""
    world = World(images=40, classes=2)
    return [draw_comparison(world, [0.0, 0.3], 3, number, draws=100) for number in range(150)]


def test_no_effect_is_rarely_called_one(comparisons):
    """tests/benchmarks/verdict_error_rate.py has 1,000 comparisons."""
    kinds = {2: [], 3: []}
    for base, idea, _ in comparisons:
        for seeds, of_seeds in kinds.items():
            found = difference(base.first(seeds), idea.first(seeds), 40)
            of_seeds.append(make_verdict(found, 0.95, 1, "AP50").kind)
    for of_seeds in kinds.values():
        # Binomial(150, 0.05) is above 15 with probability 0.003, Binomial(150, 0.025) above 9
        # with 0.006.
        assert of_seeds.count("better") + of_seeds.count("worse") <= 15
        assert of_seeds.count("better") <= 9


def test_an_interval_covers_the_true_difference(comparisons):
    found = [difference(base, idea, 40) for base, _, idea in comparisons]
    true = np.mean([one.estimate for one in found])
    assert true > 0.03
    covered = sum(low <= true <= high for low, high in (one.interval(0.8) for one in found))
    # Binomial(150, 0.8) is below 106 with probability 0.003.
    assert covered >= 106
    # And it is no interval that covers everything.
    assert np.mean([one.interval(0.8)[0] > 0 for one in found]) > 0.3
