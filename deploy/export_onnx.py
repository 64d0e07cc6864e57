"""Export a detector as one ONNX file: python deploy/export_onnx.py [EXPERIMENT] [CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_checkpoint, run, select_checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_checkpoint(
        parser, "default: the newest run's deploy.pt; a training checkpoint is folded first"
    )
    parser.add_argument("--out", type=Path, help="default: the checkpoint's name with .onnx")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="fixed input size, multiples of 32; default: any",
    )
    parser.add_argument(
        "--no-nms",
        action="store_true",
        help="return every anchor's scores and box, for runtimes without NonMaxSuppression",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Export, verify, write, report."""
    from tinydet.deployment.onnx import export_checkpoint

    checkpoint, experiment = select_checkpoint(args, "deploy.pt")
    size = tuple(args.size) if args.size else None
    print(f"checkpoint  {checkpoint}", flush=True)
    exported = export_checkpoint(
        checkpoint, args.out, size, not args.no_nms, experiment=experiment, overrides=args.set
    )
    print("\n".join(exported.lines()))


if __name__ == "__main__":
    run(main, _parser())
