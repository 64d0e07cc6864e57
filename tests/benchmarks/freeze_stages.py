"""What frozen stages save of a CPU's training step: python tests/benchmarks/freeze_stages.py.

Steps of 0, 1, 2, ... frozen stages, as they are and folded, take turns in one process of one
thread; with `--set model.freeze_norms=true` also frozen norms, as they are and in the convs. The
ratios are those of the processor's time, which other programs on the machine change less than the
clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

from tinydet.cli import add_overrides, run

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "bccd_lite0.py"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, nargs="?", default=EXPERIMENT)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="the settings")
    parser.add_argument("--size", type=int, default=320, help="image sides in pixels; default 320")
    parser.add_argument("--batch", type=int, default=8, help="images a step; default 8")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7, help="steps of each; default 7")
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Time forward and backward pass and optimizer step of each setting in turns, and print."""
    import torch

    from tinydet.experiment_file import load_experiment
    from tinydet.training.optim import make_optimizer, make_schedule
    from tinydet.training.precision import Precision, prepare_for_cpu
    from tinydet.yolof.build import build_detector

    torch.set_num_threads(1)
    experiment = load_experiment(args.experiment, args.set)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8)
    box = torch.tensor([[0.2, 0.2, 0.6, 0.7]]) * args.size
    targets = [{"boxes": box, "labels": torch.tensor([0])}] * args.batch
    precision = Precision(args.dtype, "channels_last", "")
    images = images.contiguous(memory_format=precision.torch_format)
    runs = []
    for stages, folded in product(args.stages, (False, True)):
        if folded and not stages and not experiment.model.freeze_norms:
            continue
        torch.manual_seed(0)
        detector = build_detector(replace(experiment.model, freeze_stages=stages), ("a", "b"))
        if folded:
            precision.prepare(detector)
        else:
            detector.to(memory_format=precision.torch_format)
            prepare_for_cpu(detector, bfloat16=args.dtype == "bfloat16")
        schedule = make_schedule(experiment.optim, args.batch, 1000)
        optimizer = make_optimizer(detector, experiment.optim, schedule)
        runs.append((f"{stages}{', folded' * folded}", detector.train(), optimizer))
    seconds: list[list[float]] = [[] for _ in runs]
    for done in range(args.rounds + 1):
        for (_, detector, optimizer), found in zip(runs, seconds, strict=True):
            started = time.process_time()
            with precision.autocast(images.device):
                losses, _ = detector(images, targets)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if done:  # The first step makes memory and kernels.
                found.append(time.process_time() - started)
    for (name, *_), found in zip(runs, seconds, strict=True):
        ratios = [one / first for one, first in zip(found, seconds[0], strict=True)]
        print(
            f"freeze_stages={name}: {statistics.median(found):.3f} s of processor a step, "
            f"{statistics.median(ratios):.3f} of the first "
            f"(from {min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    run(main, _parser())
