"""Where AP50 is lost: python tools/errors.py [EXPERIMENT ...] CHECKPOINT [OTHER_CHECKPOINT].

The kinds of errors are those of TIDE (arXiv 2008.08115). With OTHER_CHECKPOINT, also what changed
from the first checkpoint to it, and on which images most.
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
        help="one or two .pt files of either form, or run folders; experiment files that register "
        "their own backbones may come before them",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps")
    parser.add_argument(
        "--out", type=Path, help="folder for pictures of the images that changed most, side by side"
    )
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, classify the errors, print."""
    from tinydet.experiment_file import load_experiment

    checkpoints = [path for path in args.checkpoint if path.suffix not in (".py", ".json")]
    if len(checkpoints) not in (1, 2):
        raise ValueError(f"{len(checkpoints)} checkpoints: give one, or two to compare")
    for path in set(args.checkpoint) - set(checkpoints):
        load_experiment(path)  # registers its backbone

    from tinydet.comparison.error_analysis import error_lines

    for line in error_lines(*checkpoints, device=args.device, overrides=args.set, out=args.out):
        print(line)


if __name__ == "__main__":
    run(main, _parser())
