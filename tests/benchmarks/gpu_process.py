"""Run a part of the GPU benchmark in a process of its own, with a time limit.

After an illegal memory access or a failed assertion on the GPU a process cannot use it any more,
and a call that hangs cannot be interrupted: other parts must not suffer from either.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_sizes import Sizes

from tinydet.training.device import pick_device

Row = Mapping[str, "str | float | int | bool | None"]
Part = Callable[[torch.device, Sizes], Iterator[Row]]

_MODULES = ["torch", "torchvision", "timm", "tinydet.training.loop", "tinydet.deployment.speed"]
_OUTPUT_LINES = 40


@dataclass
class Outcome:
    """What a part found.

    Attributes:
        rows: that it returned until its end, or until it failed.
        error: why it failed; empty if it did not.
        output: last lines it printed, with the traceback of its error.
        seconds: that it took.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    output: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_part(part: Part, device: str, sizes: Sizes, seconds: float) -> Outcome:
    """Run a part in another process and return what it found, whatever becomes of it.

    Args:
        part: a function of a module; yields the rows of a table.
        device: as in `train.device`.
        sizes: of the part.
        seconds: after which it is killed; the rows it had are kept.
    """
    # A process without threads or a GPU's context, with everything imported, is forked each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = context.Process(target=_work, args=(part, device, sizes, folder))
        process.start()
        process.join(seconds)
        late = process.is_alive()
        if late:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Its children too.
            process.kill()
        process.join()
        outcome = Outcome(
            rows=[json.loads(line) for line in _lines(folder / "rows") if line.endswith("}")],
            error="".join(_lines(folder / "error")),
            output=_lines(folder / "output")[-_OUTPUT_LINES:],
            seconds=time.monotonic() - start,
        )
    if late:
        outcome.error = f"stopped at its limit of {seconds:.0f} s"
    elif process.exitcode and not outcome.error:
        outcome.error = f"its process ended with exit status {process.exitcode}"
    return outcome


def _work(part: Part, device: str, sizes: Sizes, folder: Path) -> None:
    os.setsid()
    with (folder / "output").open("w") as output, (folder / "rows").open("w") as rows:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        try:
            for row in part(pick_device(device), sizes):
                plain = {name: _without_nan(value) for name, value in row.items()}
                rows.write(json.dumps(plain, allow_nan=False) + "\n")
                rows.flush()
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip() or "no message").splitlines()[0]
            (folder / "error").write_text(f"{type(error).__name__}: {first}")
            raise SystemExit(1) from None


def _without_nan(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []
