"""All experiments side by side: python tools/zoo.py [EXPERIMENT ...]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_overrides, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Parameters and multiply-adds in both forms, the folded detector's time on this "
        "machine, and AP50 from runs/ where it was measured, as a table, JSON and a plot. A run "
        "that was killed goes on where it was.",
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        metavar="PATTERN",
        help="names of experiments with wildcards, or files; default: all of experiments/",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/zoo"), help="folder, default runs/zoo"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="input size; default: the largest that each experiment takes",
    )
    parser.add_argument("--turns", type=int, default=5, help="times ten images each, default 5")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N")
    parser.add_argument("--fresh", action="store_true", help="do again what an earlier run has")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Find, count, time, write."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: must be at least 1")

    from tinydet.deployment.find_experiments import find_experiments

    files = find_experiments(args.experiments)

    import torch

    from tinydet.deployment.zoo import ExperimentZooOptions, run_experiment_zoo

    if args.threads:
        torch.set_num_threads(args.threads)
    options = ExperimentZooOptions(
        folder=args.out,
        overrides=tuple(args.set),
        size=tuple(args.size) if args.size else None,
        turns=args.turns,
        device=args.device,
        fresh=args.fresh,
    )
    for line in run_experiment_zoo(files, options):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
