"""Draw the detections of an image: python tools/image_demo.py IMAGE EXPERIMENT CHECKPOINT."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tinydet.cli import add_overrides, run, take_lone_checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path, help="JPEG, PNG or anything else pillow reads")
    parser.add_argument(
        "experiment",
        type=Path,
        nargs="?",
        help="left out: the one the checkpoint was made with; a lone .pt file is the checkpoint",
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="left out: the newest run's best checkpoint"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N")
    parser.add_argument("--out", type=Path, help="default: NAME_detections.jpg in this folder")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="drop lower scores")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, draw, save, print."""
    from tinydet.experiment_file import experiment_from_dict, load_experiment, override

    take_lone_checkpoint(args)
    experiment = load_experiment(args.experiment, args.set) if args.experiment else None
    out = args.out or Path(f"{args.image.stem}_detections.jpg")
    if not args.image.is_file():
        raise FileNotFoundError(f"{args.image}: no such image file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")

    import torch

    from tinydet.data.image import read_image
    from tinydet.data.loader import collate
    from tinydet.data.sample import Sample
    from tinydet.data.transforms import test_transform
    from tinydet.report.draw import draw_detections, save_image
    from tinydet.training.checkpoint import load_detector, read_checkpoint
    from tinydet.training.device import pick_device
    from tinydet.training.runs import newest_checkpoint

    device = pick_device(args.device)
    image = read_image(args.image, orientation=True)
    checkpoint = args.checkpoint or newest_checkpoint(name=experiment.name if experiment else "*")
    if experiment is None:
        experiment = experiment_from_dict(read_checkpoint(checkpoint)["experiment"])
        experiment = override(experiment, args.set)
    # Boxes below the threshold asked for are dropped before any others are compared with them.
    model = replace(experiment.model, score_threshold=args.score_threshold)
    detector = load_detector(checkpoint, replace(experiment, model=model), device)

    nothing = torch.zeros(0, dtype=torch.int64)
    size = (image.shape[1], image.shape[2])
    sample = Sample(image, torch.zeros(0, 4), nothing, nothing.bool(), args.image.stem, size)
    batch = collate([test_transform(experiment.data)(sample)], keep_difficult=True)
    (found,) = detector.detect(batch.images.to(device), batch.sizes, batch.scales)

    for box, score, label in zip(
        found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
    ):
        print(f"{detector.classes[label]} {score:.2f} at", *(f"{value:.0f}" for value in box))
    drawn = draw_detections(image, found.boxes, found.labels, found.scores, detector.classes)
    save_image(drawn, out)
    print(f"{len(found.scores)} detections by {checkpoint} drawn in {out}")
    if not len(found.scores):
        print(f"none scores {args.score_threshold:g}: --score-threshold takes a lower limit")


if __name__ == "__main__":
    run(main, _parser())
