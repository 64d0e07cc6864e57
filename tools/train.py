"""Train an experiment: python tools/train.py experiments/rexnet_yolof.py."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from tinydet.cli import add_overrides, run
from tinydet.config import Experiment, Train


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "experiment", type=Path, help="a file of experiments/, or a run's experiment.json"
    )
    parser.add_argument(
        "--work-dir", type=Path, help="the run's folder; default: the next runs/NAME/N"
    )
    parser.add_argument("--seed", type=int, help="short for --set train.seed=N")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; short for --set train.device=D")
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument("--resume-from", type=Path, metavar="CHECKPOINT", help="resume from it")
    resume.add_argument(
        "--resume",
        action="store_true",
        help="resume from the last.pt of --work-dir, or of this experiment's newest run",
    )
    resume.add_argument(
        "--profile",
        action="store_true",
        help="show where the time of a training step goes; trains nothing",
    )
    parser.add_argument(
        "--budget",
        help="train for as many epochs as fit into it: a time of training steps (90s, 20m, 2h), "
        "epochs (12epochs), or multiply-adds (500Tmacs, 5Pmacs), as in tools/compare.py; a resumed "
        "run keeps the epochs that it began with",
    )
    parser.add_argument(
        "--download", action="store_true", help="download missing data without asking"
    )
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Load the experiment, make its data present, train."""
    from tinydet.experiment_file import load_experiment

    overrides = list(args.set)
    if args.seed is not None:
        overrides.append(f"train.seed={args.seed}")
    if args.device is not None:
        overrides.append(f"train.device={args.device}")
    experiment = load_experiment(args.experiment, overrides)

    from tinydet.data.dataset import fetch, is_missing
    from tinydet.experiment_code import experiment_code
    from tinydet.training.loop import train
    from tinydet.training.runs import newest_to_resume

    data = experiment.data
    if data.source == "voc07" and is_missing(data):
        wanted = args.download or (
            sys.stdin.isatty()
            and input(f"{data.root} is missing; download VOC 2007 (about 900 MB)? [y/N] ")
            .strip()
            .lower()
            .startswith("y")
        )
        if wanted:
            fetch(data)

    if args.profile:
        if args.work_dir or args.budget:
            raise ValueError("--profile trains nothing: leave out --work-dir and --budget")
        from tinydet.training.profile import profile_training

        print("\n".join(profile_training(experiment).lines()))
        return

    resume_from = args.resume_from
    if args.resume and args.work_dir:
        resume_from = args.work_dir / "last.pt"
    elif args.resume:
        resume_from = newest_to_resume(experiment.name)

    arguments = [str(args.experiment), *(["--set", *overrides] if overrides else [])]
    if args.budget:
        experiment = replace(experiment, train=_within_budget(experiment, args.budget, resume_from))
        arguments += ["--budget", args.budget]

    run_dir = args.work_dir or (resume_from and resume_from.parent)
    code = experiment_code(args.experiment)
    train(experiment, run_dir, resume_from, arguments=arguments, code=code)


def _within_budget(experiment: Experiment, budget: str, resume_from: Path | None) -> Train:
    """Return how to train within a budget: as planned now, or when the resumed run began."""
    from tinydet.comparison.budget import parse_budget
    from tinydet.comparison.plan import plan_run
    from tinydet.experiment_file import experiment_from_dict
    from tinydet.training.checkpoint import read_last

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--budget: is for one process; give several --set train.epochs=N")
    amount = parse_budget(budget)
    if resume_from:
        planned = experiment_from_dict(read_last(resume_from)["experiment"]).train
        print(f"--budget {budget}: {planned.epochs} epochs, as when the run began")
    else:
        planned = plan_run(experiment, amount)
        print(f"--budget {budget}: {planned.epochs} epochs in {planned.dtype} ({planned.reason})")
    return replace(
        experiment.train,
        epochs=planned.epochs,
        dtype=planned.dtype,
        memory_format=planned.memory_format,
    )


if __name__ == "__main__":
    run(main, _parser())
