"""Convert a data set between the layouts of VOC, COCO and YOLO: python tools/convert.py SRC DST."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All splits are converted; images are copied. What training would drop is left out, "
        "and counted.",
    )
    parser.add_argument("source", type=Path, help="a folder in one of the layouts")
    parser.add_argument("target", type=Path, help="the folder to make")
    parser.add_argument("--to", required=True, choices=("voc", "coco", "yolo"), help="its layout")
    return parser


def main(args: argparse.Namespace) -> None:
    """Read, write, report."""
    from tinydet.data.convert import convert

    for line in convert(args.source, args.target, args.to):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, _parser())
