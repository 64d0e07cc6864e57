"""Where AP50 is lost: python tools/errors.py CHECKPOINT [OTHER_CHECKPOINT].

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
    parser.add_argument("checkpoint", type=Path, help=".pt of either form, or a folder of runs/")
    parser.add_argument("other", type=Path, nargs="?", help="another, on the same images")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N")
    parser.add_argument(
        "--out", type=Path, help="draw the images that changed most, side by side, in this folder"
    )
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, tell errors apart, print."""
    from tinydet.training.error_analysis import ErrorOptions, error_lines

    options = ErrorOptions(args.device, tuple(args.set), args.out)
    for line in error_lines(args.checkpoint, args.other, options):
        print(line)


if __name__ == "__main__":
    run(main, _parser())
