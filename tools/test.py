"""Evaluate a checkpoint: python tools/test.py EXPERIMENT CHECKPOINT --eval mAP."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tinydet.atomic import check_out
from tinydet.cli import add_overrides, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="a file of experiments/, or experiment.json")
    parser.add_argument("checkpoint", type=Path, help=".pt of either form, or .onnx")
    parser.add_argument("--eval", default="mAP", choices=["mAP"], help="what to compute")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Load, evaluate, print."""
    from tinydet.experiment_file import load_experiment

    is_onnx = args.checkpoint.suffix == ".onnx"
    changed = [name for name in args.set if is_onnx and name.strip().startswith("model.")]
    if changed:
        raise ValueError(
            f"--set {changed[0]}: {args.checkpoint} is an ONNX file, whose model is fixed; export "
            "another"
        )
    check_out(args.out, [args.experiment, args.checkpoint])
    experiment = load_experiment(args.experiment, args.set)

    from tinydet.data.dataset import load_split
    from tinydet.deployment.onnx_detector import OnnxDetector
    from tinydet.training.checkpoint import load_checkpoint
    from tinydet.training.device import pick_device
    from tinydet.training.distributed import process_group, rank
    from tinydet.training.evaluate import evaluate_detector
    from tinydet.training.results import write_json

    # As in the demos: few installations of ONNX Runtime support GPUs.
    on_cpu = is_onnx and args.device == "auto"
    with process_group("cpu" if on_cpu else args.device) as name:
        device = pick_device(name)
        if is_onnx:
            detector = OnnxDetector(args.checkpoint, device)
        else:
            detector = load_checkpoint(args.checkpoint, experiment, device).detector
        data = replace(experiment.data, classes=detector.classes)
        index = load_split(data, data.test_split)
        metrics = evaluate_detector(detector, index, data, experiment.train.eval_batch_size, device)
        if rank() > 0:
            return
    if args.out:
        write_json(args.out, metrics.as_dict())
    print("\n".join(metrics.lines()))


if __name__ == "__main__":
    run(main, _parser())
