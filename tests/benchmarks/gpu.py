"""Try all GPU code on one machine in at most 9 minutes: tests, losses, resuming, speed.

Run from the project's root: python tests/benchmarks/gpu.py [--device cuda|cpu|auto] [--only PART]

Nothing is downloaded: images are rendered and weights are random. After each part gpu.md and
gpu.json in --out hold what is known so far. On a CPU every part runs in small. The exit status is 1
if a part failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gpu_process import Outcome, Part, run_part
from gpu_report import describe_machine, write_report
from gpu_sizes import SMALL, Sizes
from gpu_speed import run_onnxruntime, time_compiled, time_forward, time_selection
from gpu_tests import run_tests
from gpu_training import compare_losses, kill_and_resume, time_training

# Name, title, function, and its time limit in seconds.
PARTS: tuple[tuple[str, str, Part, float], ...] = (
    ("tests", "Tests marked gpu", run_tests, 200),
    ("losses", "Losses in float32, beside the CPU's", compare_losses, 75),
    ("resume", "A training killed and resumed", kill_and_resume, 130),
    ("training", "Training speed", time_training, 110),
    ("speed", "Forward passes", time_forward, 110),
    ("compile", "Compiled forward passes", time_compiled, 90),
    ("onnxruntime", "ONNX Runtime", run_onnxruntime, 60),
    ("selection", "Decoding and NMS", time_selection, 45),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts one after the other; return the exit status."""
    names = [name for name, *_ in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("cuda", "cpu", "auto"))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="PART")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts, default 9")
    options = parser.parse_args(arguments)

    start = time.monotonic()
    machine = describe_machine(options.device)
    sizes = Sizes() if "CUDA" in machine else SMALL
    print(f"{machine['device']}, torch {machine['torch']}", flush=True)
    titles = {name: title for name, title, *_ in PARTS if name in options.only}
    found: dict[str, Outcome] = {}
    for name, title, part, limit in PARTS:
        if name not in titles:
            continue
        left = 60 * options.minutes - (time.monotonic() - start)
        if left < 5:
            found[name] = Outcome(error=f"not run: the {options.minutes:g} minutes are over")
        else:
            # A small part may wait for a busy CPU.
            seconds = left if sizes is SMALL else min(limit, left)
            found[name] = run_part(part, options.device, sizes, seconds)
        write_report(options.out, machine, titles, found)
        outcome, total = found[name], time.monotonic() - start
        verdict = f"FAILED: {outcome.error}" if outcome.error else f"{len(outcome.rows)} rows"
        print(f"{title:36} {outcome.seconds:4.0f} s of {total:4.0f} s  {verdict}", flush=True)
    print(f"wrote {options.out / 'gpu.md'} and {options.out / 'gpu.json'}")
    return int(any(outcome.error for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
