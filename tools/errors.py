"""Where AP50 is lost: python tools/errors.py [EXPERIMENT ...] CHECKPOINT [OTHER_CHECKPOINT].

The kinds of errors are TIDE's (arXiv 2008.08115). With OTHER_CHECKPOINT: what changed from the
first to it, and on which images most.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_overrides, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        help=".pt of either form, or a folder of runs/; perhaps another to compare with; before "
        "them, experiment files that register a backbone of their own",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N")
    parser.add_argument(
        "--out", type=Path, help="draw the images that changed most, side by side, in this folder"
    )
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, tell errors apart, print."""
    from tinydet.experiment_file import load_experiment

    checkpoints = [path for path in args.checkpoint if path.suffix not in (".py", ".json")]
    if len(checkpoints) not in (1, 2):
        raise ValueError(f"{len(checkpoints)} checkpoints: give one, or two to compare")
    for path in set(args.checkpoint) - set(checkpoints):
        load_experiment(path)  # registers its backbone

    from tinydet.comparison.error_analysis import ErrorOptions, error_lines

    options = ErrorOptions(args.device, tuple(args.set), args.out)
    path, *other = checkpoints
    for line in error_lines(path, other[0] if other else None, options):
        print(line)


if __name__ == "__main__":
    run(main, _parser())
