"""What an idea costs once it is shipped: the folded ONNX files timed side by side, and counted."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tinydet.config import Experiment
from tinydet.deployment.flops import count
from tinydet.deployment.fold_checkpoint import folded_detector
from tinydet.deployment.images import largest_input, random_images, sample_images
from tinydet.deployment.timer import Candidate, measure
from tinydet.report.run_files import read_json
from tinydet.training.checkpoint import load_checkpoint
from tinydet.training.device import describe_device
from tinydet.training.results import write_json

logger = logging.getLogger(__name__)

_TURNS = 20
_FEWEST_TURNS = 8  # from which there is an interval of 95 %
_IMAGES = 5  # of a turn
_SECONDS = 120.0  # after which no turn is begun


@dataclass(frozen=True)
class Price:
    """What one experiment's folded network costs; None is what could not be measured.

    Attributes:
        params: parameters.
        multiply_adds: of the largest input.
        ms: median milliseconds of an image in ONNX Runtime on the CPU, with post-processing.
        ms_interval: of the median, 95 %.
        ratio: median over turns of its milliseconds divided by the base's.
        ratio_interval: of that median, 95 %.
        problem: why something could not be measured.
    """

    params: int | None = None
    multiply_adds: int | None = None
    ms: float | None = None
    ms_interval: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    problem: str = ""


def prices(
    experiments: Sequence[Experiment], runs: Mapping[str, Path], path: Path
) -> tuple[dict[str, Price], str]:
    """Return every experiment's price, and what it was measured on.

    Args:
        experiments: the base first.
        runs: a finished run of each, by name.
        path: where the prices are kept; those that are there already are not measured again.
    """
    names = [experiment.name for experiment in experiments]
    where = f"{describe_device(torch.device('cpu'))}, ONNX Runtime, an image at a time"
    kept = read_json(path)
    if isinstance(kept, dict) and (kept.get("where"), kept.get("runs")) == (
        where,
        {name: str(runs[name]) for name in names},
    ):
        return {name: _from_json(values) for name, values in kept["prices"].items()}, where
    logger.info("timing the folded networks side by side")
    measured = _measure(experiments, runs)
    content = {
        "where": where,
        "runs": {name: str(runs[name]) for name in names},
        "prices": {name: asdict(price) for name, price in measured.items()},
    }
    write_json(path, content)
    return measured, where


def _measure(experiments: Sequence[Experiment], runs: Mapping[str, Path]) -> dict[str, Price]:
    # Here alone: ONNX Runtime may be missing, and everything else works without.
    from tinydet.deployment.onnx import export_detector
    from tinydet.deployment.onnx_detector import SplitOnnxDetector

    counts, problems, forms, batches = {}, {}, {}, {}
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
        found[name] = Price(
            *counts[name],
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
    """Return the milliseconds of an image in each turn; every network has its own images.

    In each turn the networks go in another order, so that none always follows the largest.
    """
    turns: dict[str, list[float]] = {name: [] for name in forms}
    order, begin = list(forms), time.monotonic()
    for turn in range(_TURNS):
        for name in order:
            timing = measure({name: forms[name]}, batches[name], _IMAGES)[name]
            turns[name].append(timing.median)
        order = order[1:] + order[:1]
        if turn + 1 >= _FEWEST_TURNS and time.monotonic() - begin > _SECONDS:
            break
    return turns


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return a 95 % interval of the median: two order statistics, whatever the distribution.

    The rank-th smallest and largest value leave the median out with probability
    2 P(Binomial(n, 1/2) < rank) (Hahn & Meeker, Statistical Intervals, 1991). None where even the
    extremes are too close for that, below 6 values.
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


def _from_json(values: Mapping[str, object]) -> Price:
    intervals = {
        name: tuple(values[name]) if values[name] else None
        for name in ("ms_interval", "ratio_interval")
    }
    return Price(**{**values, **intervals})
