"""Start a script in several processes: python tools/dist_launch.py PROCESSES SCRIPT [ARGUMENTS]."""

from __future__ import annotations

import argparse
import sys

from tinydet.cli import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="The port is the environment's PORT, or a free one if that is taken. On several "
        "machines: on each, with the same NNODES, MASTER_ADDR and PORT and its own NODE_RANK.",
    )
    parser.add_argument("processes", type=int, help="on this machine")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    return parser


def main(args: argparse.Namespace) -> None:
    """Start, wait, end with the exit status of the processes."""
    from tinydet.training.launch import launch

    sys.exit(launch(args.processes, [args.script, *args.arguments]))


if __name__ == "__main__":
    run(main, _parser())
