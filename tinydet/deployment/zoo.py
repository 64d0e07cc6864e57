"""Count and time all experiments on this machine; an interrupted run is continued.

The detectors take turns, so that a machine that slows down affects all of them.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import tinydet
from tinydet.atomic import write_text
from tinydet.config import Experiment
from tinydet.deployment.flops import check_size, compare_counters, count
from tinydet.deployment.fold_checkpoint import assumed_classes, both_forms
from tinydet.deployment.images import largest_input, random_images
from tinydet.deployment.past_runs import find_past_runs, train_command
from tinydet.deployment.timer import measure
from tinydet.deployment.zoo_table import ExperimentRow, number, percent, write_zoo
from tinydet.experiment_code import experiment_code
from tinydet.experiment_file import load_experiment
from tinydet.progress import Progress
from tinydet.training.device import describe_device, pick_device
from tinydet.yolof.detector import Detector

_RECORDS = "experiments.jsonl"
_IMAGES = 10  # images per turn of a detector


@dataclass
class _Entry:
    """An experiment that is being counted and timed."""

    file: Path
    row: ExperimentRow
    size: tuple[int, int]
    experiment: Experiment
    key: str
    turns: dict[int, list[float]] = field(default_factory=dict)
    folded: Detector | None = None


def find_experiments(patterns: Sequence[str], folder: Path = Path("experiments")) -> list[Path]:
    """Return the experiment files that patterns match, sorted.

    Args:
        patterns: files, or names of experiments with wildcards; none matches all of the folder.
        folder: of experiments.

    Raises:
        ValueError: a pattern matches nothing, or the folder has no experiment.
    """
    files = sorted(folder.glob("*.py"))
    if not files and not patterns:
        raise ValueError(f"{folder}: no experiments there; go to the project's folder, or name one")
    found = set(files if not patterns else ())
    for pattern in patterns:
        path = Path(pattern)
        matches = [path] if path.is_file() else []
        matches = matches or [file for file in files if fnmatch.fnmatch(file.stem, pattern)]
        if not matches:
            near = difflib.get_close_matches(path.stem, [file.stem for file in files], 1)
            hint = f"; did you mean {folder / near[0]}.py?" if near else ""
            raise ValueError(f"{pattern}: no such experiment in {folder}{hint}")
        found.update(matches)
    return sorted(found)


def run_experiment_zoo(
    files: Sequence[Path],
    out: Path = Path("runs/zoo"),
    size: tuple[int, int] | None = None,
    turns: int = 5,
    device: str = "auto",
    fresh: bool = False,
    overrides: Sequence[str] = (),
) -> Iterator[str]:
    """Count and time experiments and write their table, yielding the report line by line.

    Every figure is saved at once; a later call with the same options continues.

    Args:
        files: experiment files.
        out: the folder of the table and the saved figures.
        size: (H, W) of the input, multiples of 32; None is the largest of each experiment.
        turns: of each detector, ten images each.
        device: "auto", "cpu", "cuda", "cuda:N", "mps".
        fresh: ignore the figures of earlier calls.
        overrides: "a.b=value" for every experiment.

    Raises:
        ValueError: an option is wrong, or experiments failed; the others are in the table.
    """
    if turns < 1:
        raise ValueError(f"--turns {turns}: must be at least 1")
    if size:
        check_size("--size", size)
    place = pick_device(device)
    where = describe_device(place)
    out.mkdir(parents=True, exist_ok=True)
    path = out / _RECORDS
    records = [] if fresh else _read(path)
    # Rewritten without the partial line that an interrupted run may have left.
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    yield f"timed on    {where}"
    rows, entries = [], []
    for file in files:
        try:
            entries.append(_begin(file, overrides, size, where))
        except ValueError as error:
            rows.append(
                _failed(ExperimentRow(file.stem, str(file), f"python tools/train.py {file}"), error)
            )
            yield _line(rows[-1])
    for entry in list(entries):
        known = _recall(entry, records)
        if known and len(entry.turns) >= turns:
            continue
        try:
            _build(entry, known, path, place)
        except Exception as error:  # A broken experiment must not stop the others.
            entries.remove(entry)
            rows.append(_failed(entry.row, error))
            yield _line(rows[-1])
        else:
            yield f"counted     {entry.row.experiment}"
    yield from _time(entries, path, place, turns)
    rows += [_finished(entry) for entry in entries]
    rows.sort(key=lambda row: row.experiment)
    yield from map(_line, (row for row in rows if not row.error))
    yield from (f"wrote       {written}" for written in write_zoo(rows, where, out))
    failed = [row.experiment for row in rows if row.error]
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} experiments failed: {', '.join(failed)}")


def _begin(
    file: Path, overrides: Sequence[str], size: tuple[int, int] | None, where: str
) -> _Entry:
    plain = load_experiment(file)
    experiment = load_experiment(file, overrides)
    size = size or largest_input(experiment.data)
    code = experiment_code(file)
    past = find_past_runs(experiment, code)
    ran = past.experiment if past else experiment
    if past and len(past.ap50) > 1:
        ran = replace(ran, train=replace(ran.train, seed=plain.train.seed))
    row = ExperimentRow(experiment.name, str(file), train_command(file, plain, ran), size)
    if past:
        data = f"{Path(past.experiment.data.root).name} {past.experiment.data.test_split}"
        row = replace(row, ap50=list(past.ap50), data=data, run=str(past.folder))
    # Everything the figures depend on: saved figures of anything else are not used.
    model = asdict(replace(experiment.model, weights="random"))
    classes = len(assumed_classes(experiment))
    versions = [tinydet.__version__, torch.__version__]
    settings = json.dumps([experiment.name, model, code, classes, size, where, versions])
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return _Entry(file, row, size, experiment, key)


def _recall(entry: _Entry, records: Sequence[dict[str, Any]]) -> bool:
    """Take an entry's figures from the records of earlier runs; return whether it was counted."""
    known = False
    for record in (record for record in records if record["key"] == entry.key):
        if "counts" in record:
            entry.row = replace(entry.row, **record["counts"])
            known = True
        else:
            entry.turns[record["turn"]] = record["ms"]
    return known


def _build(entry: _Entry, known: bool, path: Path, device: torch.device) -> None:
    training, folded = both_forms(entry.experiment)
    if not known:
        images = random_images(1, entry.size)
        before, after = count(training, images), count(folded, images)
        counts: dict[str, Any] = {
            "params_training": before.params,
            "params_deploy": after.params,
            "macs_training": before.multiply_adds,
            "macs_deploy": after.multiply_adds,
            "counters_training": compare_counters(before),
            "counters_deploy": compare_counters(after),
        }
        entry.row = replace(entry.row, **counts)
        _append(path, {"key": entry.key, "experiment": entry.row.experiment, "counts": counts})
    entry.folded = folded.to(device)
    if device.type == "cuda":
        entry.folded = entry.folded.to(memory_format=torch.channels_last)


def _time(entries: list[_Entry], path: Path, device: torch.device, turns: int) -> Iterator[str]:
    missing = sum(turn not in entry.turns for entry in entries for turn in range(turns))
    with Progress("timing the experiments", missing, "turns") as progress:
        for turn in range(turns):
            untimed = [entry for entry in entries if entry.folded and turn not in entry.turns]
            for entry in untimed:
                assert entry.folded is not None
                batch = random_images(1, entry.size).to(device)
                name = entry.row.experiment
                timing = measure({name: entry.folded}, [batch], _IMAGES)[name]
                ms = entry.turns[turn] = [round(ms, 4) for ms in timing.latencies]
                _append(path, {"key": entry.key, "experiment": name, "turn": turn, "ms": ms})
                progress.advance()
            if untimed:
                yield f"timed       turn {turn + 1} of {turns}"


def _finished(entry: _Entry) -> ExperimentRow:
    latencies = [ms for turn in entry.turns.values() for ms in turn]
    median = round(statistics.median(latencies), 4)
    return replace(entry.row, latency_ms=median, images=len(latencies))


def _failed(row: ExperimentRow, error: Exception) -> ExperimentRow:
    return replace(row, error=" ".join(f"{type(error).__name__}: {error}".split()))


def _line(row: ExperimentRow) -> str:
    if row.error:
        return f"FAILED      {row.experiment}: {row.error}"
    accuracy = f"{percent(row.ap50)} on {row.data}" if row.ap50 else "not measured"
    return (
        f"{row.experiment}: {number(row.params_deploy, 1e-6)} M parameters, "
        f"{number(row.macs_deploy, 1e-9)} G multiply-adds, {number(row.latency_ms)} ms, "
        f"AP50 {accuracy}"
    )


def _read(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # A partial line of an interrupted run.
        if isinstance(record, dict) and "key" in record:
            records.append(record)
    return records


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
