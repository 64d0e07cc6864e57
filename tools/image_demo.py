"""Draw the detections of an image: python tools/image_demo.py IMAGE [EXPERIMENT CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_detector, load_asked_detector, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path, help="JPEG, PNG or anything else pillow reads")
    add_detector(parser)
    parser.add_argument("--out", type=Path, help="default: NAME_detections.jpg in this folder")
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, draw, save, print."""
    out = args.out or Path(f"{args.image.stem}_detections.jpg")
    if not args.image.is_file():
        raise FileNotFoundError(f"{args.image}: no such image file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")

    from tinydet.data.image import read_image
    from tinydet.report.draw import draw_detections, save_image

    image = read_image(args.image, orientation=True)
    detector, checkpoint = load_asked_detector(args)
    (found,) = detector([image])
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
