"""Accuracy with and without each augmentation, at equal epochs.

python tests/benchmarks/augmentation.py experiments/quickstart.py --seeds 0 1 2
python tests/benchmarks/augmentation.py experiments/bccd_lite0.py --seeds 0 1 2

Every variant of every seed is a run of tools/train.py in OUT/<experiment>/<variant>-<seed>; a run
that is there already is not trained again, and one that was stopped goes on. The figure is AP50
after the last epoch, so that nothing is chosen on the test split. `--commands` prints the commands
alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from tinydet.cli import add_overrides, run

# By itself each, then together as one would use them; "plain" is the experiment as it stands.
VARIANTS = {
    "plain": (),
    "hsv": ("data.augment.hsv=0.015,0.7,0.4",),
    "affine": (
        "data.augment.rotate=10",
        "data.augment.shear=2",
        "data.augment.translate=0.1",
        "data.augment.zoom=0.9,1.1",
    ),
    "mosaic": ("data.augment.mosaic=0.5",),
    "mixup": ("data.augment.mixup=0.2",),
}
VARIANTS["mosaic+mixup+hsv"] = VARIANTS["mosaic"] + VARIANTS["mixup"] + VARIANTS["hsv"]
_PLAIN_SHARE = 0.15  # of the epochs, at the end


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="a file of experiments/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs/augmentation"))
    parser.add_argument("--commands", action="store_true", help="print them and do nothing")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Train what is not there yet, and print the table."""
    from tinydet.experiment_file import load_experiment

    epochs = load_experiment(args.experiment, args.set).train.epochs
    plain_epochs = max(1, round(_PLAIN_SHARE * epochs))
    folder = args.out / args.experiment.stem
    for seed in args.seeds:  # seed by seed: an early stop leaves whole comparisons
        for variant in args.variants:
            command = _command(args, folder / f"{variant}-{seed}", variant, seed, plain_epochs)
            if args.commands:
                print(shlex.join(command))
            elif _last_ap50(folder / f"{variant}-{seed}", epochs) is None:
                subprocess.run(command, check=True)
    if args.commands:
        return
    print(f"| {args.experiment.stem}, {epochs} epochs | AP50, mean of {len(args.seeds)} | each |")
    print("|---|---|---|")
    for variant in args.variants:
        found = [_last_ap50(folder / f"{variant}-{seed}", epochs) for seed in args.seeds]
        each = ", ".join(f"{ap50:.3f}" for ap50 in found)
        print(f"| {variant} | {statistics.mean(found):.3f} | {each} |")


def _command(
    args: argparse.Namespace, work_dir: Path, variant: str, seed: int, plain_epochs: int
) -> list[str]:
    command = [sys.executable, "tools/train.py", str(args.experiment), "--seed", str(seed)]
    command += ["--work-dir", str(work_dir)]
    if (work_dir / "last.pt").is_file():
        command.append("--resume")
    changes = [*args.set, *VARIANTS[variant], f"data.augment.plain_epochs={plain_epochs}"]
    return [*command, "--set", *changes]


def _last_ap50(work_dir: Path, epochs: int) -> float | None:
    """Return a finished run's AP50 after its last epoch; None if there is no such run."""
    file = work_dir / "metrics.json"
    if not file.is_file():
        return None
    metrics = json.loads(file.read_text())
    return metrics["last_AP50"] if metrics["epochs"] >= epochs else None


if __name__ == "__main__":
    run(main, _parser())
