"""Fold many models with random norms, and write how completely and how exactly as tables.

Each model runs in a process of its own. Results are written as they arrive; an interrupted run
continues where it stopped. Run from the project's root:
python tests/benchmarks/fold_zoo.py [PATTERN ...], e.g. 'repvgg*' fastvit_t8 'torchvision/fcn*'
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
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
from fold_row import FoldRow, fold_one
from fold_table import row_line, summary, write_tables
from zoo_models import choose_models, family_of

from tinydet.atomic import write_text
from tinydet.cli import run

_ROWS = "rows.jsonl"
_EXIT_SECONDS = 10.0  # for a process to end after it has sent its result


def fold_zoo(
    patterns: Sequence[str],
    folder: Path,
    workers: int = 1,
    timeout: float = 600.0,
    fresh: bool = False,
    listed: Path | None = None,
    work: Callable[[str], FoldRow] = fold_one,
) -> list[FoldRow]:
    """Fold the models that match, write a line for each as it is done, and the tables at the end.

    Args:
        patterns: names of models, with wildcards; none for all that are listed.
        folder: where the results of each model and the tables are written.
        workers: models folded at the same time, on one thread each.
        timeout: seconds after which a model is given up.
        fresh: fold again what an earlier run has folded.
        listed: a file of names, as in `choose_models`.
        work: what is done with each model; must be importable.

    Returns:
        The results, sorted by model, those of an earlier run included.

    Raises:
        ValueError: a pattern matches nothing, or an option is out of range.
    """
    if workers < 1 or not timeout > 0:
        raise ValueError("--workers must be at least 1 and --timeout more than 0 seconds")
    names = choose_models(patterns, listed)
    path = folder / _ROWS
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        kept = [row for name, row in read_rows(path).items() if name not in names]
        write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in kept))
    earlier = read_rows(path)
    done = {name: earlier[name] for name in names if name in earlier and not earlier[name].problem}
    if done:
        print(f"{len(done)} of {len(names)} models were folded before ({path}); --fresh repeats")
    todo = [name for name in names if name not in done]
    with path.open("a") as file:
        for row in fold_in_processes(todo, workers, timeout, work):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            done[row.model] = row
            print(f"{len(done):4}/{len(names)}  {row_line(row)}", flush=True)
    rows = [done[name] for name in names]
    write_tables(rows, folder)
    print(summary(rows))
    return rows


def read_rows(path: Path) -> dict[str, FoldRow]:
    """Return the results in a file, the last one of each model; none if there is no file."""
    rows: dict[str, FoldRow] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            fields = json.loads(line)
            sizes = tuple((height, width) for height, width in fields["other_sizes"])
            row = FoldRow(**{**fields, "other_sizes": sizes})
        except (ValueError, TypeError, KeyError):
            continue  # Half a line of an interrupted run, or the fields of another version.
        rows[row.model] = row
    return rows


def fold_in_processes(
    names: Sequence[str],
    workers: int,
    timeout: float,
    work: Callable[[str], FoldRow] = fold_one,
) -> Iterator[FoldRow]:
    """Yield each model's result as it is done; a process that dies or hangs is a result as well.

    Args:
        names: the models, started in this order.
        workers: processes at the same time.
        timeout: seconds for each.
        work: what a process does; must be importable.
    """
    context = process_context()
    waiting = deque(names)
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Job.start(context, waiting.popleft(), timeout, work))
            seconds = min(job.deadline for job in running) - time.monotonic()
            wait([job.results for job in running], max(0.0, seconds))
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
    def start(context: Any, model: str, timeout: float, work: Callable[[str], FoldRow]) -> _Job:
        results, sender = context.Pipe(duplex=False)
        # A daemon: it dies with this process.
        process = context.Process(target=_send_result, args=(work, model, sender), daemon=True)
        process.start()
        sender.close()  # The process holds the only end now: when it dies, `results` ends.
        return _Job(model, process, results, time.monotonic() + timeout)

    def outcome(self, timeout: float) -> FoldRow | None:
        """Return the result if there is one by now, or if there will be none."""
        if self.results.poll():
            try:
                row = self.results.recv()
                self.process.join(_EXIT_SECONDS)
            except EOFError:
                self.process.join()
                row = self._failed(f"its process died ({_exit_reason(self.process.exitcode)})")
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

    def _failed(self, why: str) -> FoldRow:
        return FoldRow(self.model, family_of(self.model), error=why)


def _send_result(work: Callable[[str], FoldRow], name: str, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # On Ctrl-C the parent kills its processes.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sender.send(work(name))


def process_context() -> Any:
    """Return the multiprocessing context in which a process starts soonest with torch imported."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imports torch and timm once and not for each model.
    context.set_forkserver_preload(["timm", "tinydet.reparam"])
    return context


def _exit_reason(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return signal.Signals(-exitcode).name  # SIGKILL usually means that memory ran out.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="names of models, with wildcards; default: all that are listed",
    )
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FILE",
        help="list of names to choose from, default timm_models.txt, or any with a PATTERN",
    )
    parser.add_argument("--workers", type=int, default=1, help="models at a time, default 1")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds for a model, default 600"
    )
    parser.add_argument("--fresh", action="store_true", help="fold again what was folded before")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/zoo"), help="folder of the results, default runs/zoo"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Fold, write, print; exit status 1 if a fold is wrong."""
    rows = fold_zoo(args.patterns, args.out, args.workers, args.timeout, args.fresh, args.models)
    if any(row.problem for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(main, _parser())
