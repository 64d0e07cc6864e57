"""Make a run's report.html anew from its folder: python tools/report.py runs/NAME/1."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a folder of runs/; its files are enough")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="first find curves, kinds of errors and worst images again, with best.pt and the data",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; for --evaluate")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the page, and where asked what it needs."""
    if args.evaluate:
        from tinydet.training.results import evaluate_again

        evaluate_again(args.run_dir, args.device)

    from tinydet.report.page import write_page

    print(f"written to {write_page(args.run_dir)}")


if __name__ == "__main__":
    run(main, _parser())
