"""Quantize a detector for ONNX Runtime: python deploy/quantize.py [EXPERIMENT] [CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_checkpoint, given, run, select_checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Int8, with ranges measured on training images. Accuracy and speed before and after "
        "are printed; layers that lose too much accuracy stay in float.",
    )
    add_checkpoint(
        parser, "default: the newest run's deploy.pt; a training checkpoint is folded first"
    )
    parser.add_argument("--out", type=Path, help="default: the checkpoint's name with .int8.onnx")
    parser.add_argument("--images", type=int, help="to measure ranges on, default 64")
    parser.add_argument(
        "--budget", type=float, help="AP50 in 0..1 that may be lost, default 0.01, a point"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="fixed input size; default: any"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Quantize, evaluate, time, write, report."""
    from tinydet.deployment.quantize import quantize_checkpoint

    checkpoint, experiment = select_checkpoint(args, "deploy.pt")
    options = given(args, "out", "images", "budget", "size")
    print(f"checkpoint  {checkpoint}", flush=True)
    lines = quantize_checkpoint(checkpoint, **options, experiment=experiment, overrides=args.set)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
