"""Judge ideas against a base: python tools/compare.py BASE.py IDEA.py ... [--budget 20m]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_overrides, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Every experiment is trained on the same images in the same order, for the same "
        "budget, with a few seeds; then each idea is better, worse, the same, or it cannot be told "
        "yet, and how many more seeds probably would. Stopped or killed, the same command goes on; "
        "runs that are finished already, also those of other comparisons, are used again.",
    )
    parser.add_argument("base", type=Path, help="a file of experiments/")
    parser.add_argument("ideas", type=Path, nargs="+", metavar="idea", help="files to judge")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each experiment, at least 2, default 3"
    )
    parser.add_argument(
        "--budget",
        default="20m",
        help="of each run: time of its training steps (90s, 20m, 2h), epochs (12epochs), or "
        "multiply-adds of the forward passes over its training images (500Tmacs, 5Pmacs); "
        "default 20m. Time and multiply-adds become whole epochs once, before the first run",
    )
    parser.add_argument(
        "--metric", default="AP50", help="what verdicts are about: AP50 (default) or AP"
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="that no verdict, of all ideas together, is wrong; default 0.95",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="after 2, 4, 8, ... seeds, drop ideas that do not help with that confidence",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:N; short for --set train.device=D")
    parser.add_argument("--out", type=Path, help="folder; default runs/compare/BASE-...")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Train what is missing, judge, print, write."""
    from tinydet.comparison.compare import CompareOptions, compare

    overrides = [*args.set, *([f"train.device={args.device}"] if args.device else [])]
    options = CompareOptions(
        seeds=args.seeds,
        budget=args.budget,
        metric=args.metric,
        confidence=args.confidence,
        halving=args.halving,
        folder=args.out,
        overrides=tuple(overrides),
    )
    for line in compare([args.base, *args.ideas], options):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
