"""How often a comparison's verdict is wrong, and how often it sees what is there.

Detections of runs are simulated (tests/comparison/simulated.py) and judged by the code that judges
real ones, on 60 test images, AP50; --world changes how runs and images vary. Run from the project's
root, some minutes of one core:
python tests/benchmarks/verdict_error_rate.py [--comparisons 1000] [--world images=300 alike=30]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comparison"))

from simulated import World, draw_comparison

from tinydet.comparison.uncertainty import Scores, difference
from tinydet.comparison.verdict import decide

_CONFIDENCE = 0.95
_SEEDS = (2, 3, 5)
_EFFECTS = (0.05, 0.1, 0.2, 0.4)
_MORE_SEEDS = (2, 3, 5, 8)


def _plain_bootstrap(base: Scores, idea: Scores) -> tuple[float, float]:
    """Return the interval of a bootstrap over images and seeds that knows of no correction."""
    rng = np.random.default_rng(0)
    seeds, draws = base.resampled.shape
    means = [
        np.take_along_axis(s.resampled, rng.integers(0, seeds, (seeds, draws)), axis=0).mean(axis=0)
        for s in (base, idea)
    ]
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return float(low), float(high)


def _without_effect(comparisons: int, world: World) -> None:
    counts = {(ideas, n): np.zeros(4, int) for ideas in (1, 3) for n in _SEEDS}
    spreads, means, any_look = [], [], np.zeros(2, int)
    for number in range(comparisons):
        scores = draw_comparison(world, [0.0] * 3, max(_SEEDS), number)
        spreads.append(scores[0].seed_variance)
        means.append(scores[0].mean)
        looks: set[str] = set()
        for (ideas, n), count in counts.items():
            base, *others = (s.first(n) for s in scores[: ideas + 1])
            found = [difference(base, other, world.images) for other in others]
            kinds = [decide(one, _CONFIDENCE, ideas)[0] for one in found]
            intervals = found[0].interval(_CONFIDENCE), _plain_bootstrap(base, others[0])
            looks |= set(kinds) if ideas == 1 else set()
            count += ["better" in kinds, "worse" in kinds, *(lo <= 0 <= hi for lo, hi in intervals)]
        any_look += ["better" in looks, "worse" in looks]
    mean, spread = 100 * np.mean(means), 100 * np.sqrt(np.mean(spreads))
    print(f"AP50 of the base {mean:.1f} ± {spread:.1f} between seeds; {comparisons} comparisons\n")
    print("| seeds | ideas at once | 'better' | 'worse' | 95 % covers | plain bootstrap covers |")
    print("|---:|---:|---:|---:|---:|---:|")
    for (ideas, n), count in counts.items():
        shares = " | ".join(f"{100 * share:.1f} %" for share in count / comparisons)
        print(f"| {n} | {ideas} | {shares} |")
    better, worse = 100 * any_look / comparisons
    print(
        f"\nLooked at after 2, 3 and 5 seeds, whatever was said before: 'better' once "
        f"{better:.1f} %, 'worse' once {worse:.1f} %",
        flush=True,
    )


def _with_effect(comparisons: int, world: World) -> None:
    better = np.zeros((len(_EFFECTS), len(_MORE_SEEDS)), int)
    found = {(e, n): [] for e in _EFFECTS for n in _MORE_SEEDS}
    for number in range(comparisons):
        base, *ideas = draw_comparison(world, _EFFECTS, max(_MORE_SEEDS), number)
        for i, (effect, idea) in enumerate(zip(_EFFECTS, ideas, strict=True)):
            for j, n in enumerate(_MORE_SEEDS):
                one = difference(base.first(n), idea.first(n), world.images)
                found[effect, n].append(one)
                better[i, j] += decide(one, _CONFIDENCE, 1)[0] == "better"
    print(f"\n'better' where there is an effect, {comparisons} comparisons:\n")
    header = " | ".join(f"{n} seeds" for n in _MORE_SEEDS)
    print(f"| true difference of AP50, points | {header} | 95 % covers |")
    print("|---:|" + "---:|" * (len(_MORE_SEEDS) + 1))
    for effect, row in zip(_EFFECTS, better / comparisons, strict=True):
        # Nobody can say what the true difference is but by many comparisons.
        true = float(np.mean([one.estimate for one in found[effect, max(_MORE_SEEDS)]]))
        intervals = [one.interval(_CONFIDENCE) for n in _MORE_SEEDS for one in found[effect, n]]
        covered = np.mean([low <= true <= high for low, high in intervals])
        cells = [f"{100 * true:+.1f}", *(f"{100 * x:.0f} %" for x in row), f"{100 * covered:.1f} %"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main(comparisons: int, world: World) -> None:
    """Print both tables; of test images that are alike the first alone."""
    _without_effect(comparisons, world)
    if world.alike == 1:
        _with_effect(comparisons // 3, world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument(
        "--world", nargs="+", default=[], metavar="NAME=VALUE", help="fields of simulated.World"
    )
    args = parser.parse_args()
    fields = dict(field.split("=") for field in args.world)
    world = World(**{name: type(getattr(World, name))(value) for name, value in fields.items()})
    main(args.comparisons, world)
