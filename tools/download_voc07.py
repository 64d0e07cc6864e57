"""Download PASCAL VOC 2007 (0.9 GB): python tools/download_voc07.py."""

from __future__ import annotations

import argparse

from tinydet.cli import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="datasets", help="folder for VOCdevkit/VOC2007")
    return parser


def main(args: argparse.Namespace) -> None:
    """Download, unpack, print."""
    from tinydet.data.download import download_voc07

    print(f"PASCAL VOC 2007 is in {download_voc07(args.root)}")


if __name__ == "__main__":
    run(main, _parser())
