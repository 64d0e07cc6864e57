"""All experiments side by side: python tools/zoo.py [EXPERIMENT ...]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_overrides, given, run, set_threads


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Parameters and multiply-adds in both forms, the folded detector's time on this "
        "machine, and AP50 from runs/ where it was measured, as a table, JSON and a plot. If "
        "interrupted, rerun the command; finished figures are reused.",
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        metavar="PATTERN",
        help="names of experiments with wildcards, or files; default: all of experiments/",
    )
    parser.add_argument("--out", type=Path, help="folder, default runs/zoo")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="input size; default: the largest of each experiment",
    )
    parser.add_argument("--turns", type=int, help="of ten images each, default 5")
    parser.add_argument("--threads", type=int, help="CPU threads; default: as many as help now")
    parser.add_argument("--device", help="cpu, cuda, cuda:N, mps")
    parser.add_argument("--fresh", action="store_true", help="ignore the figures of earlier runs")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Find, count, time, write."""
    from tinydet.deployment.zoo import find_experiments, run_experiment_zoo

    files = find_experiments(args.experiments)
    set_threads(args.threads)
    options = given(args, "out", "size", "turns", "device", "fresh")
    for line in run_experiment_zoo(files, **options, overrides=args.set):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
