"""Every experiment counted and timed on this machine; a killed run goes on where it was.

The detectors take turns: a machine that slows down slows them all.
"""

from __future__ import annotations

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
from tinydet.deployment.forms import assumed_classes, both_forms
from tinydet.deployment.images import largest_input, random_images
from tinydet.deployment.measured import newest_measured, train_command
from tinydet.deployment.speed import clock_for, measure
from tinydet.deployment.zoo_table import ZooRow, percent, write_zoo
from tinydet.experiment_file import load_experiment
from tinydet.training.device import describe_device, pick_device
from tinydet.training.runs import RUNS
from tinydet.yolof.detector import Detector

_RECORDS = "experiments.jsonl"
_IMAGES = 10  # images a detector is timed on before it is the next one's turn


@dataclass(frozen=True)
class ExperimentZooOptions:
    """How to go through the experiments.

    Attributes:
        folder: where the table and the records go.
        overrides: "a.b=value" for every experiment.
        size: (H, W) of the input, multiples of 32; None is the largest of each experiment.
        turns: of each detector, with ten images each.
        device: "auto", "cpu", "cuda", "cuda:N".
        fresh: count and time again what an earlier run has.
        runs: the folder of runs, where measured accuracy is looked up.
    """

    folder: Path = Path("runs/zoo")
    overrides: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    turns: int = 5
    device: str = "auto"
    fresh: bool = False
    runs: Path = RUNS


@dataclass
class _Entry:
    """An experiment on its way to a row."""

    file: Path
    row: ZooRow
    size: tuple[int, int]
    experiment: Experiment
    key: str
    turns: dict[int, list[float]] = field(default_factory=dict)
    folded: Detector | None = None


def run_experiment_zoo(files: Sequence[Path], options: ExperimentZooOptions) -> Iterator[str]:
    """Count and time experiments and write their table, yielding what to tell the user.

    Every figure is written as it comes, so that a later run with the same options goes on.

    Args:
        files: experiment files.
        options: how.

    Raises:
        ValueError: an option is wrong, or experiments failed; the others are in the table.
    """
    if options.turns < 1:
        raise ValueError(f"--turns {options.turns}: must be at least 1")
    if options.size:
        check_size("--size", options.size)
    device = pick_device(options.device)
    where = describe_device(device)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / _RECORDS
    records = [] if options.fresh else _read(path)
    # Also without the half line that a killed run may have left.
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    yield f"timed on    {where}"
    rows, entries = [], []
    for file in files:
        try:
            entries.append(_begin(file, options, where))
        except ValueError as error:
            rows.append(
                _failed(ZooRow(file.stem, str(file), f"python tools/train.py {file}"), error)
            )
            yield _told(rows[-1])
    for entry in list(entries):
        known = _recall(entry, records)
        if known and len(entry.turns) >= options.turns:
            continue
        try:
            _build(entry, known, path, device)
        except Exception as error:  # One experiment's fault ends no other's.
            entries.remove(entry)
            rows.append(_failed(entry.row, error))
            yield _told(rows[-1])
        else:
            yield f"counted     {entry.row.experiment}"
    yield from _time(entries, path, device, options.turns)
    rows += [_finished(entry) for entry in entries]
    rows.sort(key=lambda row: row.experiment)
    yield from map(_told, (row for row in rows if not row.error))
    yield from (f"wrote       {written}" for written in write_zoo(rows, where, options.folder))
    failed = [row.experiment for row in rows if row.error]
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} experiments failed: {', '.join(failed)}")


def _begin(file: Path, options: ExperimentZooOptions, where: str) -> _Entry:
    plain = load_experiment(file)
    experiment = load_experiment(file, options.overrides)
    size = options.size or largest_input(experiment.data)
    measured = newest_measured(experiment, options.runs)
    ran = measured.experiment if measured else experiment
    if measured and len(measured.ap50) > 1:
        ran = replace(ran, train=replace(ran.train, seed=plain.train.seed))
    row = ZooRow(experiment.name, str(file), train_command(file, plain, ran), size)
    if measured:
        data = f"{Path(measured.experiment.data.root).name} {measured.experiment.data.test_split}"
        row = replace(row, ap50=list(measured.ap50), data=data, run=str(measured.run))
    # What the figures depend on: an older figure of anything else is none.
    model = asdict(replace(experiment.model, weights="random"))
    classes = len(assumed_classes(experiment))
    versions = [tinydet.__version__, torch.__version__]
    settings = json.dumps([experiment.name, model, classes, size, where, versions])
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return _Entry(file, row, size, experiment, key)


def _recall(entry: _Entry, records: Sequence[dict[str, Any]]) -> bool:
    """Take an entry's figures from the records of earlier runs; say if it was counted."""
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
        counts = {
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
    clock = clock_for(device)
    for turn in range(turns):
        untimed = [entry for entry in entries if entry.folded and turn not in entry.turns]
        for entry in untimed:
            batch = random_images(1, entry.size).to(device)
            name = entry.row.experiment
            timing = measure({name: entry.folded}, [batch], _IMAGES, clock)[name]
            entry.turns[turn] = [round(ms, 4) for ms in timing.latencies]
            record = {"key": entry.key, "experiment": name, "turn": turn, "ms": entry.turns[turn]}
            _append(path, record)
        if untimed:
            yield f"timed       turn {turn + 1} of {turns}"


def _finished(entry: _Entry) -> ZooRow:
    latencies = [ms for turn in entry.turns.values() for ms in turn]
    median = round(statistics.median(latencies), 4)
    return replace(entry.row, latency_ms=median, images=len(latencies))


def _failed(row: ZooRow, error: Exception) -> ZooRow:
    return replace(row, error=" ".join(f"{type(error).__name__}: {error}".split()))


def _told(row: ZooRow) -> str:
    if row.error:
        return f"FAILED      {row.experiment}: {row.error}"
    accuracy = f"{percent(row.ap50)} on {row.data}" if row.ap50 else "not measured"
    return (
        f"{row.experiment}: {row.params_deploy / 1e6:.2f} M parameters, "
        f"{row.macs_deploy / 1e9:.2f} G multiply-adds, {row.latency_ms:.2f} ms, AP50 {accuracy}"
    )


def _read(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # Half a line of a killed run.
        if isinstance(record, dict) and "key" in record:
            records.append(record)
    return records


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
