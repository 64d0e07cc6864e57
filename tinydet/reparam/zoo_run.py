"""Many of timm's models folded, each in a process of its own; a killed run goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinydet.atomic import write_text
from tinydet.reparam.zoo import ZooRow, fold_one
from tinydet.reparam.zoo_models import choose_models, family_of
from tinydet.reparam.zoo_table import row_line, summary, write_tables

_ROWS = "rows.jsonl"
_FAREWELL = 10.0  # seconds a process has to tidy up behind its result


@dataclass(frozen=True)
class ZooOptions:
    """How to go through the zoo.

    Attributes:
        folder: where the results of each model and the tables go.
        workers: models folded at the same time, on one thread each.
        timeout: seconds after which a model is given up.
        fresh: fold again what an earlier run has folded.
    """

    folder: Path = Path("runs/zoo")
    workers: int = 1
    timeout: float = 600.0
    fresh: bool = False


def fold_zoo(
    patterns: Sequence[str], options: ZooOptions, console: Console | None = None
) -> list[ZooRow]:
    """Fold the models that match, write a line for each as it is done, and the tables at the end.

    Args:
        patterns: names of timm's models, with wildcards; none for a sample of the families.
        options: how.
        console: told of each model and of the whole.

    Returns:
        The results, sorted by model, those of an earlier run included.

    Raises:
        ValueError: a pattern matches nothing, or an option is out of range.
    """
    if options.workers < 1 or not options.timeout > 0:
        raise ValueError("--workers must be at least 1 and --timeout more than 0 seconds")
    console = console or Console()
    names = choose_models(patterns)
    path = options.folder / _ROWS
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        _forget(path, names)
    earlier = read_rows(path)
    done = {name: earlier[name] for name in names if name in earlier and not earlier[name].problem}
    if done:
        told = f"{len(done)} of {len(names)} models were folded before ({path}); --fresh does again"
        _say(console, told)
    todo = [name for name in names if name not in done]
    with _progress(console) as progress, path.open("a") as file:
        task = progress.add_task("folded", total=len(names), completed=len(done))
        for row in fold_in_processes(todo, options.workers, options.timeout):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            done[row.model] = row
            _say(progress.console, row_line(row))
            progress.advance(task)
    rows = [done[name] for name in names]
    write_tables(rows, options.folder)
    _say(console, summary(rows))
    return rows


def read_rows(path: Path) -> dict[str, ZooRow]:
    """Return the results in a file, the last one of each model; none if there is no file."""
    rows: dict[str, ZooRow] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            fields = json.loads(line)
            size = fields["other_size"]
            row = ZooRow(**{**fields, "other_size": tuple(size) if size else None})
        except (ValueError, TypeError, KeyError):
            continue  # Half a line of a killed run, or the fields of another version.
        rows[row.model] = row
    return rows


def fold_in_processes(
    names: Sequence[str],
    workers: int,
    timeout: float,
    work: Callable[[str], ZooRow] = fold_one,
) -> Iterator[ZooRow]:
    """Yield each model's result as it is done; a process that dies or hangs is a result as well.

    Args:
        names: the models, begun in this order.
        workers: processes at the same time.
        timeout: seconds for each.
        work: what a process does; must be importable.
    """
    context = _context()
    waiting = deque(names)
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Job.start(context, waiting.popleft(), timeout, work))
            patience = min(job.deadline for job in running) - time.monotonic()
            wait([job.results for job in running], max(0.0, patience))
            for job in list(running):
                row = job.outcome(timeout)
                if row is not None:
                    running.remove(job)
                    yield row
    finally:
        for job in running:
            job.end()


@dataclass(frozen=True)
class _Job:
    model: str
    process: BaseProcess
    results: Connection
    deadline: float

    @staticmethod
    def start(context: Any, model: str, timeout: float, work: Callable[[str], ZooRow]) -> _Job:
        results, sender = context.Pipe(duplex=False)
        # A daemon: it dies with this process.
        process = context.Process(target=_in_process, args=(work, model, sender), daemon=True)
        process.start()
        sender.close()  # The process holds the only end now: when it dies, `results` ends.
        return _Job(model, process, results, time.monotonic() + timeout)

    def outcome(self, timeout: float) -> ZooRow | None:
        """Return the result if there is one by now, or if there will be none."""
        if self.results.poll():
            try:
                row = self.results.recv()
                self.process.join(_FAREWELL)
            except EOFError:
                self.process.join()
                row = self._failed(f"its process died ({_how(self.process.exitcode)})")
        elif time.monotonic() >= self.deadline:
            row = self._failed(f"not done after {timeout:g} s (--timeout)")
        else:
            return None
        self.end()
        return row

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.results.close()

    def _failed(self, why: str) -> ZooRow:
        return ZooRow(self.model, family_of(self.model), error=why)


def _how(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return signal.Signals(-exitcode).name  # SIGKILL mostly means that memory ran out.


def _in_process(work: Callable[[str], ZooRow], model: str, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends its processes itself.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sender.send(work(model))


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imports torch and timm once, not for each model.
    context.set_forkserver_preload([__name__])
    return context


def _forget(path: Path, names: Sequence[str]) -> None:
    kept = [row for name, row in read_rows(path).items() if name not in set(names)]
    write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in kept))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
