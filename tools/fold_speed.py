"""Time folded backbones in ONNX Runtime: python tools/fold_speed.py [MODEL ...]."""

from __future__ import annotations

import argparse

from tinydet.cli import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="names of timm's models; default: RepVGG-A0, MobileOne-S1, ReXNet-1.0, FastViT-T8, "
        "ResNet-18, RepViT-M1",
    )
    parser.add_argument("--size", type=int, default=320, help="side of the input, default 320")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, default 2")
    parser.add_argument("--repeats", type=int, default=100, help="runs of each, default 100")
    return parser


def main(args: argparse.Namespace) -> None:
    """Build, fold, export, time, print."""
    from tinydet.deployment.fold_speed import MODELS, FoldSpeedOptions, time_models

    options = FoldSpeedOptions(args.size, args.threads, args.repeats)
    for line in time_models(args.models or MODELS, options):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
