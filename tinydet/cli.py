"""What every command line shares: errors in one line, and the options that pick an experiment."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tinydet.memory import keep_freed_memory

if TYPE_CHECKING:
    from tinydet.deployment.runtime import Detector


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse `sys.argv` and call `main`; a user's mistake is one line on stderr and exit 2."""
    _print_in_any_encoding()
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    keep_freed_memory()
    # Of processes that train together, the first one speaks for all.
    speaks = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if speaks else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[_StdoutHandler()])
    # Other libraries' news would drown ours.
    for name in ("timm", "torch", "httpx", "onnxscript", "onnx_ir", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch sets the levels of its own parts as it is imported: by this.
    os.environ.setdefault("TORCH_LOGS", "-all")
    try:
        main(args)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        _let_the_first_speak(speaks)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt as error:
        _let_the_first_speak(speaks)
        if speaks:
            print(error if str(error) else "stopped", file=sys.stderr)  # noqa: T201
        # That of a signal, where it is not Ctrl-C's own.
        sys.exit(getattr(error, "exit_status", 130))


def _print_in_any_encoding() -> None:
    """Let a letter that the terminal or a pipe cannot take be written as its code, not end all."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _let_the_first_speak(speaks: bool) -> None:
    """Wait a little in the other processes: as one ends by a failure, torchrun ends them all."""
    if not speaks:
        time.sleep(3)


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
    """Where EXPERIMENT CHECKPOINT are optional, let a lone name be what its suffix says."""
    lone = args.experiment and args.checkpoint is None
    if lone and args.experiment.suffix not in (".py", ".json"):
        args.experiment, args.checkpoint = None, args.experiment


def add_checkpoint(parser: argparse.ArgumentParser, default: str) -> None:
    """Add [EXPERIMENT] [CHECKPOINT], of which either may be left out."""
    parser.add_argument(
        "experiment",
        type=Path,
        nargs="?",
        help="whose newest run to take; needed where it registers a backbone of its own",
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help=default)


def asked_checkpoint(args: argparse.Namespace, file_name: str) -> Path:
    """Return the checkpoint that the options of `add_checkpoint` ask for.

    Args:
        args: parsed.
        file_name: of the newest run's checkpoint, where none is named.

    Raises:
        ValueError: no such experiment, or no run has such a checkpoint.
    """
    from tinydet.experiment_file import load_experiment
    from tinydet.training.runs import newest_checkpoint

    take_lone_checkpoint(args)
    # Loaded even where only the checkpoint's own matters: it may register its backbone.
    name = load_experiment(args.experiment).name if args.experiment else "*"
    return args.checkpoint or newest_checkpoint(file_name=file_name, name=name)


def take_last_files(args: argparse.Namespace, names: list[Path]) -> None:
    """Where EXPERIMENT CHECKPOINT come behind any number of names, take them off the list's end.

    Raises:
        ValueError: no name is left.
    """
    if names[-1].suffix in (".pt", ".onnx"):
        args.checkpoint = names.pop()
    if names and names[-1].suffix in (".py", ".json"):
        args.experiment = names.pop()
    if not names:
        raise ValueError("name an image before the experiment and the checkpoint")


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Add [EXPERIMENT CHECKPOINT], --device, --score-threshold and --set."""
    parser.add_argument(
        "experiment",
        type=Path,
        nargs="?",
        help="left out: the checkpoint's own; a lone .pt or .onnx file is the checkpoint",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help=".pt or .onnx; left out: the newest run's best checkpoint",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="drop lower scores")
    add_overrides(parser)


def load_asked_detector(args: argparse.Namespace) -> tuple[Detector, Path]:
    """Return the detector that the options of `add_detector` ask for, folded, and its file.

    Raises:
        ValueError: a file is missing or wrong; --set was given for an ONNX file, which holds all
            that matters itself.
    """
    from tinydet.deployment.runtime import Detector
    from tinydet.experiment_file import experiment_from_dict, load_experiment, override
    from tinydet.training.checkpoint import read_checkpoint
    from tinydet.training.device import pick_device
    from tinydet.training.runs import newest_checkpoint

    take_lone_checkpoint(args)
    experiment = load_experiment(args.experiment, args.set) if args.experiment else None
    path = args.checkpoint or newest_checkpoint(name=experiment.name if experiment else "*")
    if path.suffix == ".onnx" and args.set:
        raise ValueError(f"--set changes an experiment, and {path} is an ONNX file: export another")
    # An ONNX Runtime that knows GPUs is rare: there the GPU is asked for by name.
    own_choice = path.suffix == ".onnx" and args.device == "auto"
    device = pick_device("cpu" if own_choice else args.device)
    if experiment is None and args.set:
        stored = experiment_from_dict(read_checkpoint(path)["experiment"])
        experiment = override(stored, args.set)
    return Detector.load(path, experiment, device, args.score_threshold).folded(), path
