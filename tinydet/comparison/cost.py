"""What an idea costs at deployment: latency of the folded ONNX networks, and their size."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tinydet.config import Experiment
from tinydet.deployment.flops import count
from tinydet.deployment.fold_checkpoint import folded_detector
from tinydet.deployment.images import largest_input, random_images, sample_images
from tinydet.deployment.timer import Candidate, measure
from tinydet.progress import Progress
from tinydet.report.run_folder import read_json
from tinydet.training.checkpoint import load_checkpoint
from tinydet.training.device import describe_device
from tinydet.training.results import write_json

logger = logging.getLogger(__name__)

_TURNS = 20
_FEWEST_TURNS = 8  # enough for a 95 % interval
_IMAGES = 5  # in each turn
_SECONDS = 120.0  # no turn is started after that


@dataclass(frozen=True)
class Cost:
    """What the folded network of an experiment costs; None if it could not be measured.

    Attributes:
        params: number of parameters.
        multiply_adds: for an image of the largest input size.
        ms: median milliseconds for one image in ONNX Runtime on the CPU, with post-processing.
        ms_interval: 95 % interval of that median.
        ratio: median over turns of the milliseconds divided by the base's.
        ratio_interval: 95 % interval of that median.
        problem: why something could not be measured.
    """

    params: int | None = None
    multiply_adds: int | None = None
    ms: float | None = None
    ms_interval: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    problem: str = ""


def measure_costs(
    experiments: Sequence[Experiment], runs: Mapping[str, Path], path: Path
) -> tuple[dict[str, Cost], str]:
    """Return the cost of each experiment by name, and the machine it was measured on.

    Args:
        experiments: the base first.
        runs: a finished run of each, by name.
        path: file to keep the costs in; costs that are in it already are not measured again.
    """
    names = [experiment.name for experiment in experiments]
    where = f"{describe_device(torch.device('cpu'))}, ONNX Runtime, one image at a time"
    kept = read_json(path)
    if isinstance(kept, dict) and (kept.get("where"), kept.get("runs")) == (
        where,
        {name: str(runs[name]) for name in names},
    ):
        return {name: _from_json(values) for name, values in kept["costs"].items()}, where
    logger.info("timing the folded networks side by side")
    measured = _measure(experiments, runs)
    content = {
        "where": where,
        "runs": {name: str(runs[name]) for name in names},
        "costs": {name: asdict(cost) for name, cost in measured.items()},
    }
    write_json(path, content)
    return measured, where


def _measure(experiments: Sequence[Experiment], runs: Mapping[str, Path]) -> dict[str, Cost]:
    # Imported here: ONNX Runtime may be missing, and everything else works without it.
    from tinydet.deployment.onnx import export_detector
    from tinydet.deployment.onnx_detector import SplitOnnxDetector

    counts: dict[str, tuple[int, int] | tuple[None, None]] = {}
    problems: dict[str, str] = {}
    forms: dict[str, Candidate] = {}
    batches: dict[str, Sequence[torch.Tensor]] = {}
    for experiment in experiments:
        name = experiment.name
        counts[name] = None, None
        try:
            folded = folded_detector(load_checkpoint(runs[name] / "last.pt"))
            counted = count(folded, random_images(1, largest_input(experiment.data)))
            counts[name] = counted.params, counted.multiply_adds
            model = export_detector(folded, experiment.data)
            forms[name] = SplitOnnxDetector(model, torch.get_num_threads())
            batches[name] = sample_images(experiment, _IMAGES, 1).batches
        except (ValueError, OSError, RuntimeError) as error:
            problems[name] = " ".join(str(error).split())
            forms.pop(name, None)
            logger.warning("%s: not timed: %s", name, problems[name])
    turns = _time(forms, batches)
    base = turns.get(experiments[0].name, [])
    found = {}
    for experiment in experiments:
        name = experiment.name
        times = turns.get(name, [])
        ratios = [a / b for a, b in zip(times, base, strict=False)]
        params, multiply_adds = counts[name]
        found[name] = Cost(
            params,
            multiply_adds,
            ms=statistics.median(times) if times else None,
            ms_interval=median_interval(times),
            ratio=statistics.median(ratios) if ratios else None,
            ratio_interval=median_interval(ratios),
            problem=problems.get(name, ""),
        )
    return found


def _time(
    forms: Mapping[str, Candidate], batches: Mapping[str, Sequence[torch.Tensor]]
) -> dict[str, list[float]]:
    """Return the milliseconds for one image in each turn; every network has its own images.

    The order of the networks changes from turn to turn, so that none always follows the largest.
    """
    turns: dict[str, list[float]] = {name: [] for name in forms}
    order, begin = list(forms), time.monotonic()
    with Progress("timing the networks", _TURNS, "turns", left="left at most") as progress:
        for turn in range(_TURNS):
            for name in order:
                timing = measure({name: forms[name]}, batches[name], _IMAGES)[name]
                turns[name].append(timing.median)
            order = order[1:] + order[:1]
            progress.advance()
            if turn + 1 >= _FEWEST_TURNS and time.monotonic() - begin > _SECONDS:
                break
    return turns


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return a 95 % interval of the median, for any distribution: two order statistics.

    The rank-th smallest and largest values exclude the median with probability
    2 P(Binomial(n, 1/2) < rank) (Hahn & Meeker, Statistical Intervals, 1991). With fewer than 6
    values there is no such interval, and None is returned.
    """
    n = len(values)
    outside, rank = 0.0, 0
    while 2 * (outside + math.comb(n, rank) / 2**n) <= 0.05:
        outside += math.comb(n, rank) / 2**n
        rank += 1
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[n - rank]


def _from_json(values: dict[str, Any]) -> Cost:
    intervals = ("ms_interval", "ratio_interval")
    return Cost(**values | {name: values[name] and tuple(values[name]) for name in intervals})
