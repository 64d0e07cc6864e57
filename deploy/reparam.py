"""Fold a trained detector for shipping: python deploy/reparam.py [CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="default: the newest run's best.pt"
    )
    parser.add_argument("--out", type=Path, help="default: deploy.pt beside the checkpoint")
    return parser


def main(args: argparse.Namespace) -> None:
    """Fold, check, write, report."""
    from tinydet.deployment.reparameterize import reparameterize_checkpoint
    from tinydet.training.runs import newest_checkpoint

    checkpoint = args.checkpoint or newest_checkpoint()
    print(f"checkpoint  {checkpoint}")
    print("\n".join(reparameterize_checkpoint(checkpoint, args.out).lines()))


if __name__ == "__main__":
    run(main, _parser())
