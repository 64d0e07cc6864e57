"""Fold a trained detector for shipping: python deploy/reparam.py [EXPERIMENT] [CHECKPOINT].

With --zoo it folds models of timm instead, with random norms, and writes how completely and how
exactly: python deploy/reparam.py --zoo 'repvgg*' fastvit_t8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinydet.cli import add_checkpoint, run, select_checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint(parser, "default: the newest run's best.pt")
    parser.add_argument(
        "--out", type=Path, help="default: deploy.pt beside the checkpoint; with --zoo runs/zoo"
    )
    parser.add_argument(
        "--zoo",
        nargs="*",
        metavar="PATTERN",
        help="fold timm's models of these names instead; default: a sample of every family",
    )
    parser.add_argument("--workers", type=int, help="with --zoo: models at a time, default 1")
    parser.add_argument(
        "--timeout", type=float, help="with --zoo: seconds for a model, default 600"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="with --zoo: fold again what was folded before"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Fold, check, write, report."""
    if args.zoo is not None:
        _fold_zoo(args)
        return
    if args.fresh or args.workers is not None or args.timeout is not None:
        raise ValueError("--workers, --timeout and --fresh are for --zoo")

    from tinydet.deployment.fold_checkpoint import fold_checkpoint

    checkpoint = select_checkpoint(args, "best.pt")
    print(f"checkpoint  {checkpoint}")
    print("\n".join(fold_checkpoint(checkpoint, args.out).lines()))


def _fold_zoo(args: argparse.Namespace) -> None:
    if args.experiment is not None:
        raise ValueError(f"{args.experiment}: --zoo folds timm's models, and no checkpoint")

    from tinydet.reparam.zoo_run import ZooOptions, fold_zoo

    given = {"folder": args.out, "workers": args.workers, "timeout": args.timeout}
    given = {name: value for name, value in given.items() if value is not None}
    rows = fold_zoo(args.zoo, ZooOptions(**given, fresh=args.fresh))
    if any(row.problem for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(main, _parser())
