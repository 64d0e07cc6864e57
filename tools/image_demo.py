"""Draw the detections of images: python tools/image_demo.py IMAGE ... [EXPERIMENT] [CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_predictor, load_predictor, run, take_last_files


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "image",
        type=Path,
        nargs="+",
        help="JPEG, PNG or anything else pillow reads; folders, and quoted patterns like 'a/*.jpg'",
    )
    add_predictor(parser)
    parser.add_argument(
        "--out", type=Path, help="a folder, or a file for one picture of all; default: this folder"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, draw, save, print."""
    from tinydet.data.image import find_images

    take_last_files(args, args.image)
    images = find_images(args.image)

    from tinydet.deployment.demos import draw_images, drawn_paths

    paths = drawn_paths(images, args.out)
    predictor, checkpoint = load_predictor(args)
    print(f"checkpoint  {checkpoint}", flush=True)
    for line in draw_images(predictor, images, paths):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
