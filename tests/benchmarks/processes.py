"""Train in one process and in several with the same total batch, and compare losses and numbers.

Run from the project's root: python tests/benchmarks/processes.py [--processes N] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tinydet.config import Data
from tinydet.data.shapes import render_shapes
from tinydet.training.distributed import process_group, rank, world_size

_HERE = Path(__file__).resolve()
sys.path.insert(0, str(_HERE.parents[1] / "training"))
from run_in_processes import learn, score  # noqa: E402

_BATCH = 12
_CLASSES = ("circle", "square", "triangle")  # those of `score`'s detector


def _measure(folder: Path, steps: int) -> None:
    """Train and evaluate with the processes there are; each writes what it found."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        losses, _ = learn(steps, _BATCH)
        data = Data(str(folder / "shapes"), "shapes", classes=_CLASSES, image_size=96)
        found = {"losses": losses, "metrics": score(data)}
        (folder / f"{rank()}_of_{world_size()}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, choices=(2, 3, 4, 6))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        _measure(options.folder, options.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # 17 images: no number of processes divides them.
        render_shapes(folder / "shapes", num_train=1, num_test=17, image_size=96, seed=1)
        arguments = [str(_HERE), "--folder", name, "--steps", str(options.steps)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        for command in (arguments, [*launch, str(options.processes), *arguments]):
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        (one,) = (json.loads(path.read_text()) for path in folder.glob("*_of_1.json"))
        several = [
            json.loads((folder / f"{n}_of_{options.processes}.json").read_text())
            for n in range(options.processes)
        ]
    pairs = [pair for s in several for pair in zip(one["losses"], s["losses"], strict=True)]
    furthest = max(abs(a - b) / abs(a) for a, b in pairs)
    print(f"losses      of {options.steps} steps from {pairs[0][0]:.4f} to {one['losses'][-1]:.4f}")
    print(f"difference  at most {furthest:.1e} of a loss, one process and {options.processes}")
    same = all(s["metrics"] == one["metrics"] for s in several)
    print(
        f"evaluation  of {one['metrics']['images']} images: AP50 {one['metrics']['AP50']:.6f}, "
        f"{'all numbers identical' if same else 'the numbers DIFFER'}"
    )


if __name__ == "__main__":
    main()
