"""Count parameters and multiply-adds: python tools/flops.py EXPERIMENT."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_overrides, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="In training form and folded, with random weights; no data is needed.",
    )
    parser.add_argument("experiment", type=Path, help="a file of experiments/, or experiment.json")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        default=[1280, 800],
        metavar="PIXELS",
        help="height and width of the input, or one number for a square; default 1280 800",
    )
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Build, fold, count, print."""
    from tinydet.experiment_file import load_experiment

    if len(args.shape) > 2:
        shape = " ".join(map(str, args.shape))
        raise ValueError(f"--shape {shape}: give height and width, or one number for a square")
    experiment = load_experiment(args.experiment, args.set)

    from tinydet.deployment.flops import flops_lines

    for line in flops_lines(experiment, (args.shape[0], args.shape[-1])):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
