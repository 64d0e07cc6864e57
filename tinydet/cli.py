"""Shared by all command lines: errors in one line, and options that choose a checkpoint."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydet.console import StdoutHandler, discard_output, log_level
from tinydet.memory import is_out_of_memory, keep_freed_memory

if TYPE_CHECKING:
    from tinydet.config import Experiment
    from tinydet.deployment.predictor import Predictor

_FULL = (
    "out of memory: use a smaller train.batch_size, with train.accumulate for the same steps, "
    "train.eval_batch_size or data.image_size (--debug shows where)"
)


_DRAWN_SCORE = 0.3


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse `sys.argv` and call `main`; a user's mistake is one line on stderr, exit status 2."""
    _print_in_any_encoding()
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = _parse(parser)
    keep_freed_memory()
    prints = log_level() == logging.INFO
    logging.basicConfig(level=log_level(), format="%(message)s", handlers=[StdoutHandler()])
    # Other libraries log too much.
    for name in ("timm", "torch", "httpx", "onnxscript", "onnx_ir", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch reads the log levels of its parts from here as it is imported.
    os.environ.setdefault("TORCH_LOGS", "-all")
    # The same: what an Apple GPU lacks runs on the CPU, with a warning of torch's.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    try:
        main(args)
    except BrokenPipeError:
        discard_output()
        sys.exit(141)  # as of a command that SIGPIPE ended
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        is_full = is_out_of_memory(error)
        if args.debug or not (is_full or isinstance(error, (ValueError, OSError))):
            raise
        _let_rank0_print_first(prints)
        message = _FULL if is_full else " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt as error:
        _let_rank0_print_first(prints)
        if prints:
            print(error if str(error) else "stopped", file=sys.stderr)  # noqa: T201
        # A signal other than Ctrl-C sets its own exit status.
        sys.exit(getattr(error, "exit_status", 130))


def _parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    try:
        return parser.parse_intermixed_args()  # Files may follow options.
    except TypeError:  # It takes no parser with subcommands.
        return parser.parse_args()


def _print_in_any_encoding() -> None:
    """Write characters that the output's encoding lacks as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _let_rank0_print_first(prints: bool) -> None:
    """Wait a little in the other processes: when one fails, torchrun kills all of them."""
    if not prints:
        time.sleep(3)


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
    """If only one of [EXPERIMENT] [CHECKPOINT] is given, decide by its suffix which one it is."""
    lone = args.experiment and args.checkpoint is None
    if lone and args.experiment.suffix not in (".py", ".json"):
        args.experiment, args.checkpoint = None, args.experiment


def add_checkpoint(parser: argparse.ArgumentParser, default: str) -> None:
    """Add [EXPERIMENT] [CHECKPOINT], each of which is optional, and --set."""
    parser.add_argument(
        "experiment",
        type=Path,
        nargs="?",
        help="selects its newest run, and replaces the checkpoint's own; required if it defines "
        "its own backbone",
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help=default)
    add_overrides(parser)


def select_checkpoint(args: argparse.Namespace, file_name: str) -> tuple[Path, Experiment | None]:
    """Return the checkpoint that the options of `add_checkpoint` select, and the experiment named.

    Args:
        args: parsed.
        file_name: which of the newest run's checkpoints to use if none is named.

    Raises:
        ValueError: there is no such experiment, or no run has such a checkpoint.
    """
    from tinydet.experiment_file import load_experiment
    from tinydet.training.runs import newest_checkpoint

    take_lone_checkpoint(args)
    experiment = load_experiment(args.experiment, args.set) if args.experiment else None
    name = experiment.name if experiment else "*"
    checkpoint = args.checkpoint or newest_checkpoint(file_name=file_name, name=name)
    set_threads()
    return checkpoint, experiment


def take_last_files(args: argparse.Namespace, names: list[Path]) -> None:
    """Split NAME ... [EXPERIMENT] [CHECKPOINT]: move the last two from the list to `args`.

    Raises:
        ValueError: no name is left.
    """
    is_run = (names[-1] / "best.pt").is_file()  # whose folder the loader of checkpoints refuses
    if names[-1].suffix in (".pt", ".onnx") or is_run:
        args.checkpoint = names.pop()
    if names and names[-1].suffix in (".py", ".json"):
        args.experiment = names.pop()
    if not names:
        raise ValueError("name an image before the experiment and the checkpoint")


def add_predictor(parser: argparse.ArgumentParser) -> None:
    """Add [EXPERIMENT CHECKPOINT], --device, --score-threshold and --set."""
    parser.add_argument(
        "experiment",
        type=Path,
        nargs="?",
        help="default: the checkpoint's own; a .pt or .onnx file alone is the checkpoint",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help=".pt or .onnx; default: the newest run's best checkpoint",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps")
    parser.add_argument(
        "--score-threshold",
        type=float,
        help=f"drop lower scores, default {_DRAWN_SCORE}, or the checkpoint's if that is higher",
    )
    add_overrides(parser)


def load_predictor(args: argparse.Namespace) -> tuple[Predictor, Path]:
    """Return the predictor that the options of `add_predictor` select, folded, and its file.

    Raises:
        ValueError: a file is missing or wrong, or --set was given for an ONNX file.
    """
    from tinydet.deployment.predictor import Predictor
    from tinydet.experiment_file import load_experiment
    from tinydet.training.device import pick_device
    from tinydet.training.runs import newest_checkpoint

    take_lone_checkpoint(args)
    experiment = load_experiment(args.experiment, args.set) if args.experiment else None
    path = args.checkpoint or newest_checkpoint(name=experiment.name if experiment else "*")
    set_threads()
    # Few installations of ONNX Runtime support GPUs: "auto" is the CPU for ONNX files.
    on_cpu = path.suffix == ".onnx" and args.device == "auto"
    device = pick_device("cpu" if on_cpu else args.device)
    predictor = Predictor(path, experiment, device, args.score_threshold, args.set).folded()
    if args.score_threshold is None:
        predictor.score_threshold = max(predictor.score_threshold, _DRAWN_SCORE)
    return predictor, path


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the named options that were given; the function that they are for has the defaults."""
    values = {name: getattr(args, name) for name in names}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def set_threads(threads: int | None = None) -> None:
    """Apply the option --threads: CPU threads of torch; None is what is fastest at the moment.

    Raises:
        ValueError: it is not positive.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: must be at least 1")

    import torch

    from tinydet.training.threads import Threads

    if threads is None:
        Threads(torch.device("cpu")).adapt()
    else:
        torch.set_num_threads(threads)
