"""Kill a training 20 times, resume it each time, and compare its end with one never killed.

Run from the project's root: python tests/benchmarks/kill_and_resume.py [--kills N] [--seed N]
[--set NAME=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from small_run import Training, small_experiment

from tinydet.cli import add_overrides
from tinydet.training.checkpoint import CheckpointError, previous_of, read_checkpoint


def last_of(run: Path) -> dict:
    """Return what --resume would go on from, and leave the files as they are."""
    try:
        return read_checkpoint(run / "last.pt")
    except CheckpointError:
        return read_checkpoint(previous_of(run / "last.pt"))


def _is_writing(run: Path) -> bool:
    return any(run.glob(".last.*.tmp.pt"))


def _kill(training: Training, run: Path, kind: str, draw: random.Random) -> bool:
    """Wait for a moment of this kind, and kill; returns False if the run ended before."""
    trained = run / "log.jsonl"
    size = trained.stat().st_size if trained.is_file() else 0
    if kind == "any moment":
        delay = draw.uniform(0, 8)
        alive = training.wait_until(lambda: training.seconds > delay)
    else:
        # The first line after the start: log.jsonl is cut back when the run goes on.
        alive = training.wait_until(
            lambda: training.seconds > 2 and trained.is_file() and trained.stat().st_size > size
        )
        moment = time.monotonic() + draw.uniform(0, 1.5)
        alive = alive and training.wait_until(lambda: time.monotonic() > moment)
    if kind == "inside a write":
        alive = alive and training.wait_until(lambda: _is_writing(run))
        moment = time.monotonic() + draw.uniform(0, 0.03)  # a write takes some 40 ms
        alive = alive and training.wait_until(lambda: time.monotonic() > moment)
    if alive:
        training.signal(signal.SIGKILL)
    return training.end() == -signal.SIGKILL


def _same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(_same, one, two))
    return one == two


def main(kills: int, seed: int, overrides: list[str]) -> bool:
    """Print a line a kill, then the verdict; returns whether all is the same."""
    draw = random.Random(seed)
    kinds = ["inside a write", "between steps or in one", "any moment"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # As many steps as the kills leave time for, and some.
        epochs = 6 * kills  # Too many to be through with before the last kill.
        experiment = small_experiment(folder, epochs=epochs)
        changes = ["--set", *overrides] if overrides else []
        whole = Training(folder, experiment, "--work-dir", folder / "whole", *changes)
        if whole.end():
            sys.exit("\n".join(whole.output()))
        print(f"undisturbed: {whole.seconds:.0f} s")

        run, done, left_overs = folder / "killed", 0, 0
        while done < kills:
            resume = ["--resume"] if any(run.glob("last*.pt")) else []
            training = Training(folder, experiment, "--work-dir", run, *resume, *changes)
            kind = kinds[done % len(kinds)]
            if not _kill(training, run, kind, draw):
                print("\n".join(training.output()))
                print(f"the run ended before kill {done + 1}")
                break
            done += 1
            half = sum(path.stat().st_size for path in run.glob(".last.*.tmp.pt"))
            left_overs += half > 0
            there = last_of(run) if any(run.glob("last*.pt")) else {"epoch": "-", "step": "-"}
            print(
                f"kill {done:2}: {kind:24} {training.seconds:5.1f} s after its start;"
                f" checkpoint: epoch {there['epoch']}, step {there['step']}"
                + (f"; half a file of {half / 1e6:.2f} MB left" if half else ""),
                flush=True,
            )
        if last_of(run)["epoch"] < epochs:
            last = Training(folder, experiment, "--work-dir", run, "--resume", *changes)
            if last.end():
                sys.exit("\n".join(last.output()))

        one, two = last_of(folder / "whole"), last_of(run)
        parts = ("model", "raw_model", "optimizer", "steps_done", "ema_updates", "images_seen")
        same = {part: _same(one[part], two[part]) for part in parts}
        records = [
            [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
            for path in (folder / "whole", run)
        ]
        # Lines of training end where a checkpoint was written, which depends on the clock.
        evaluations = [[r for r in of_run if r["mode"] == "val"] for of_run in records]
        same["evaluations logged"] = evaluations[0] == evaluations[1]
        steps = [r["step"] for r in records[1] if r["mode"] == "train"]
        same["steps logged once"] = steps == sorted(set(steps))
        print(f"{done} kills, {left_overs} of them left half a file; after the end:")
        print(", ".join(f"{part}: {'identical' if s else 'DIFFERENT'}" for part, s in same.items()))
        return all(same.values()) and done == kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    add_overrides(parser)
    args = parser.parse_args()
    sys.exit(0 if main(args.kills, args.seed, args.set) else 1)
