"""Rebuild a run's report.html from its folder: python tools/report.py runs/NAME/1."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="first evaluate best.pt again, which needs the data, for curves and images",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps, for --evaluate")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the page, after an evaluation if requested."""
    if args.evaluate:
        from tinydet.training.results import evaluate_again

        evaluate_again(args.run_dir, args.device)

    from tinydet.report.page import write_page

    print(f"written to {write_page(args.run_dir)}")


if __name__ == "__main__":
    run(main, _parser())
