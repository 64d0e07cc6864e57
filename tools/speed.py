"""Time a detector, forward and post-processing: python tools/speed.py [EXPERIMENT CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_overrides, run, take_lone_checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "experiment",
        type=Path,
        nargs="?",
        help="default: the checkpoint's own; a lone .pt file is the checkpoint",
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: the newest best.pt")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="run in float16 (meant for a GPU)")
    precision.add_argument("--bf16", action="store_true", help="run in bfloat16")
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="memory format; default: channels_last on a GPU",
    )
    parser.add_argument(
        "--compile", action="store_true", help="time the forms compiled by torch.compile as well"
    )
    parser.add_argument(
        "--backend",
        choices=["torch", "onnxruntime", "all"],
        default="torch",
        help="what runs the checkpoint, default torch",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="other checkpoints (timed folded) and ONNX files, timed in the same run; also "
        "ssdlite320_mobilenet_v3_large, torchvision's with random weights",
    )
    parser.add_argument("--images", type=int, default=2000, help="images to time, default 2000")
    parser.add_argument("--batch-size", type=int, default=1, help="images in a batch, default 1")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="input size; default: the experiment's",
    )
    parser.add_argument("--no-fuse", action="store_true", help="time the unfolded form alone")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N")
    parser.add_argument(
        "--time-limit", type=float, default=60.0, help="seconds, default 60; 0 for no limit"
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
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: must be at least 1")

    import torch

    from tinydet.deployment.speed_report import SpeedOptions, time_checkpoint
    from tinydet.training.runs import newest_checkpoint

    if args.threads:
        torch.set_num_threads(args.threads)
    name = experiment.name if experiment else "*"
    checkpoint = args.checkpoint or newest_checkpoint(name=name)
    options = SpeedOptions(
        images=args.images,
        batch_size=args.batch_size,
        size=tuple(args.size) if args.size else None,
        precision="float16" if args.fp16 else "bfloat16" if args.bf16 else "float32",
        channels_last=args.channels_last,
        compile=args.compile,
        backend=args.backend,
        others=tuple(args.beside),
        fuse=not args.no_fuse,
        device=args.device,
        time_limit=args.time_limit,
        out=args.out,
    )
    print(f"checkpoint  {checkpoint}", flush=True)
    for line in time_checkpoint(checkpoint, experiment, options):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
