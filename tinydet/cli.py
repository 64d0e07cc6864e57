"""What every command line shares: errors in one line, and the options that pick an experiment."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TextIO


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse `sys.argv` and call `main`; a user's mistake is one line on stderr and exit 2."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_StdoutHandler()])
    # Other libraries' news would drown ours.
    for name in ("timm", "torch", "httpx", "onnxscript", "onnx_ir", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main(args)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201
        sys.exit(130)


class _StdoutHandler(logging.StreamHandler):
    """Writes to whatever `sys.stdout` is at that moment: a progress bar on screen replaces it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add --set."""
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="NAME=VALUE",
        help="change fields of the experiment, e.g. train.epochs=3 data.image_size=416",
    )


def take_lone_checkpoint(args: argparse.Namespace) -> None:
    """Where EXPERIMENT CHECKPOINT are optional, let a lone .pt file be the checkpoint."""
    if args.experiment and args.checkpoint is None and args.experiment.suffix == ".pt":
        args.experiment, args.checkpoint = None, args.experiment
