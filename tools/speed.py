"""Time a detector, forward and post-processing: python tools/speed.py [EXPERIMENT] [CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_overrides, given, run, set_threads, take_lone_checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "experiment",
        type=Path,
        nargs="?",
        help="default: the checkpoint's own; a .pt file alone is the checkpoint",
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: the newest best.pt")
    precision = parser.add_mutually_exclusive_group()
    for option, dtype in (("--fp16", "float16"), ("--bf16", "bfloat16")):
        precision.add_argument(
            option, dest="precision", action="store_const", const=dtype, help=f"run in {dtype}"
        )
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="memory format; default: channels_last on a GPU only",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time the forms compiled by torch.compile"
    )
    parser.add_argument(
        "--backend",
        choices=["torch", "onnxruntime", "all"],
        help="what runs the checkpoint, default torch",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="other checkpoints (timed folded) and ONNX files, timed in the same run; also "
        "ssdlite320_mobilenet_v3_large, torchvision's with random weights",
    )
    parser.add_argument("--images", type=int, help="images to time, default 2000")
    parser.add_argument("--batch-size", type=int, help="images in a batch, default 1")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="input size; default: the experiment's",
    )
    parser.add_argument(
        "--no-fuse", dest="fuse", action="store_false", help="time the unfolded form only"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: as many as help now")
    parser.add_argument("--device", help="cpu, cuda, cuda:N, mps")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="default 60; 0 for no limit"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Load, time, print."""
    from tinydet.experiment_file import load_experiment

    take_lone_checkpoint(args)
    experiment = load_experiment(args.experiment, args.set) if args.experiment else None
    if args.set and experiment is None:
        raise ValueError("--set changes an experiment: name its file before the checkpoint")

    from tinydet.deployment.speed import time_checkpoint
    from tinydet.training.runs import newest_checkpoint

    set_threads(args.threads)
    name = experiment.name if experiment else "*"
    checkpoint = args.checkpoint or newest_checkpoint(name=name)
    options = given(
        args,
        *("images", "batch_size", "size", "precision", "channels_last", "compile", "backend"),
        *("beside", "fuse", "device", "time_limit", "out"),
    )
    chosen = "" if args.checkpoint else " (the newest; name another before the options)"
    print(f"checkpoint  {checkpoint}{chosen}", flush=True)
    for line in time_checkpoint(checkpoint, experiment, **options):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
