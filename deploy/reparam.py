"""Fold a trained detector for deployment: python deploy/reparam.py [EXPERIMENT] [CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_checkpoint, run, select_checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_checkpoint(parser, "default: the newest run's best.pt")
    parser.add_argument("--out", type=Path, help="default: deploy.pt beside the checkpoint")
    return parser


def main(args: argparse.Namespace) -> None:
    """Fold, check, write, report."""
    from tinydet.deployment.fold_checkpoint import fold_checkpoint

    checkpoint, experiment = select_checkpoint(args, "best.pt")
    print(f"checkpoint  {checkpoint}", flush=True)
    print("\n".join(fold_checkpoint(checkpoint, args.out, experiment, args.set).lines()))


if __name__ == "__main__":
    run(main, _parser())
