"""Compare ideas with a base: python tools/compare.py BASE.py IDEA.py ... [--budget 20m]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_overrides, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Every experiment is trained on the same images in the same order, with the same "
        "budget and a few seeds. The verdict on each idea is better, worse, the same, or can't "
        "tell yet, with the number of seeds that would probably be enough. If interrupted, rerun "
        "the command; finished runs are reused, also those of other comparisons.",
    )
    parser.add_argument("base", type=Path, help="a file of experiments/")
    parser.add_argument("ideas", type=Path, nargs="+", metavar="idea", help="files to compare")
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="runs of each experiment, at least 2 (default %(default)s)",
    )
    parser.add_argument(
        "--budget",
        default="20m",
        help="budget of each run: time of its training steps (90s, 20m, 2h), epochs (12epochs), or "
        "multiply-adds of the forward passes over its training images (500Tmacs, 5Pmacs); time and "
        "multiply-adds are converted to whole epochs before the first run (default %(default)s)",
    )
    parser.add_argument(
        "--metric", default="AP50", help="metric of the verdicts: AP50 or AP (default %(default)s)"
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="probability that no verdict is wrong, for all ideas together (default %(default)s)",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="after 2, 4, 8, ... seeds, drop ideas that do not help, with that confidence",
    )
    parser.add_argument(
        "--shard",
        metavar="K/N",
        help="train only the K-th of N shares of the runs, beside other processes or machines with "
        "the same working folder; the command without it judges",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; short for --set train.device=D")
    parser.add_argument("--out", type=Path, help="folder (default runs/compare/BASE-...)")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Train the missing runs, reach verdicts, print and write the report."""
    from tinydet.comparison.compare import compare, parse_shard

    overrides = [*args.set, *([f"train.device={args.device}"] if args.device else [])]
    lines = compare(
        [args.base, *args.ideas],
        seeds=args.seeds,
        budget=args.budget,
        metric=args.metric,
        confidence=args.confidence,
        halving=args.halving,
        shard=parse_shard(args.shard) if args.shard else None,
        folder=args.out,
        overrides=overrides,
    )
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
