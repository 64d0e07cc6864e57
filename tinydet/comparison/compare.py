"""A whole comparison: plan, runs, verdicts, costs, files."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tinydet.comparison.budget import parse_budget
from tinydet.comparison.cost import measure_costs
from tinydet.comparison.error_analysis import image_change_lines
from tinydet.comparison.plan import Plan, load_experiments, make_plan
from tinydet.comparison.report import Outcome, Report, report_lines, write_report
from tinydet.comparison.runs import (
    finished_run,
    outdated_runs,
    run_detections,
    train_run,
    training_speed,
)
from tinydet.comparison.uncertainty import FEWEST_IMAGES, Difference, Scores, difference
from tinydet.comparison.verdict import Verdict, interim_looks, make_verdict, should_prune
from tinydet.config import ConfigError, Experiment
from tinydet.data.dataset import load_split
from tinydet.data.index import Index
from tinydet.evaluation.boxes import GroundTruth
from tinydet.evaluation.coco import match_coco
from tinydet.evaluation.errors import compare_errors
from tinydet.evaluation.saved_detections import SavedDetections
from tinydet.evaluation.tide import KINDS, tide
from tinydet.evaluation.weighted import (
    voc_matches,
    weighted_area_ap,
    weighted_coco_ap,
)
from tinydet.training.evaluate import ground_truth, require_objects
from tinydet.training.nonfinite import DivergedError

logger = logging.getLogger(__name__)

METRICS = ("AP50", "AP")


@dataclass(frozen=True)
class Shard:
    """A share of a comparison's runs.

    Attributes:
        number: of the share, from 1.
        of: number of shares.
    """

    number: int
    of: int

    def has(self, place: int) -> bool:
        """Return whether a run is in the share, by its place among all runs, from 0."""
        return place % self.of == self.number - 1


def parse_shard(text: str) -> Shard:
    """Read "2/3".

    Raises:
        ConfigError: the text is not that, or there is no such share.
    """
    read = re.fullmatch(r"(\d+)/(\d+)", text)
    shard = Shard(int(read[1]), int(read[2])) if read else Shard(0, 0)
    if not 1 <= shard.number <= shard.of:
        raise ConfigError(f"--shard {text}: give K/N, such as 1/3, 2/3 or 3/3")
    return shard


@dataclass
class _Entry:
    """The state of one experiment of the comparison."""

    experiment: Experiment
    code: str
    runs: list[Path] = field(default_factory=list)
    detections: list[SavedDetections] = field(default_factory=list)
    lost: list[dict[str, float]] = field(default_factory=list)  # AP50 lost to errors, by seed
    values: dict[str, list[np.ndarray]] = field(default_factory=lambda: {m: [] for m in METRICS})
    ended: str = ""  # why no more seeds of it are trained
    dropped: bool = False

    @property
    def mean_lost(self) -> dict[str, float]:
        return {
            kind: float(np.mean([lost[kind] for lost in self.lost]))
            for kind in (KINDS if self.lost else ())
        }

    def scores(self, metric: str) -> Scores:
        values = np.array(self.values[metric])
        return Scores(values[:, 0], values[:, 1:])


def compare(
    files: Sequence[Path],
    *,
    seeds: int,
    budget: str,
    metric: str,
    confidence: float,
    halving: bool = False,
    shard: Shard | None = None,
    resamples: int = 1000,
    folder: Path | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[str]:
    """Train experiments, reach verdicts and write the results; yield lines for the user.

    If interrupted, call it again with the same arguments; finished runs are reused.

    Args:
        files: experiment files, the base first.
        seeds: runs of each experiment, at least 2.
        budget: budget of each run, see `parse_budget`.
        metric: the metric that the verdicts are about, "AP50" or "AP".
        confidence: probability that no verdict of the comparison is wrong.
        halving: drop ideas that do not help after 2, 4, 8, ... seeds.
        shard: train only this share of the runs, and reach no verdict.
        resamples: number of bootstrap draws of the test images.
        folder: folder of the comparison; None is a new one in `runs/compare/`.
        overrides: "a.b=value" for every experiment.

    Raises:
        ValueError: an argument or a file is wrong, the experiments cannot be compared, the test
            split has no object to find, or a run of the base has diverged.
    """
    _check(seeds, metric, confidence, resamples)
    if shard and halving:
        raise ConfigError("--shard: cannot be with --halving, which waits for all runs of a seed")
    looks = interim_looks(seeds) if halving else []
    if halving and not looks:
        raise ConfigError(f"--halving: looks before the last seed, and --seeds {seeds} has no such")
    parsed_budget = parse_budget(budget)
    experiments = load_experiments(files, overrides)
    index = load_split(experiments[0].data, experiments[0].data.test_split)
    require_objects(index)
    plan = make_plan(files, experiments, parsed_budget, folder)
    if problem := _too_few(index):
        logger.warning("there will be no verdict: %s", problem)
    yield f"comparison  {plan.folder}"
    for experiment, reason in zip(plan.experiments, plan.reasons, strict=True):
        epochs, dtype = experiment.train.epochs, experiment.train.dtype
        yield f"{experiment.name}: {epochs} epoch{'s'[: epochs > 1]} in {dtype} ({reason})"
    entries = [_Entry(*pair) for pair in zip(plan.experiments, plan.codes, strict=True)]
    truth, weights = ground_truth(index), _draws(len(index), resamples)
    for seed in range(seeds):
        for place, entry in enumerate(entries, seed * len(entries)):
            if shard and not shard.has(place):
                continue
            if not entry.ended:
                title = f"{entry.experiment.name}, seed {seed + 1} of {seeds}"
                count = f"run {place + 1} of {seeds * len(entries)}"
                yield from _run(entry, seed, title, count, is_base=entry is entries[0])
            if not entry.ended and not shard:
                _score(entry, index, truth, weights)
        if seed + 1 in looks and not problem:
            yield from _prune(entries, len(index), metric, confidence, len(looks))
    if shard:
        trained = sum(len(entry.runs) for entry in entries)
        yield f"shard {shard.number}/{shard.of}: its {trained} runs are finished; the command "
        yield "without --shard judges them when the other shares are finished too"
        return
    report = _report(plan, entries, metric, confidence, index)
    yield from report_lines(report)
    yield from (f"wrote       {path}" for path in write_report(report, plan.folder))
    for idea in entries[1:]:
        yield from _changes(entries[0], idea, index, truth, plan.folder)


def _check(seeds: int, metric: str, confidence: float, resamples: int) -> None:
    if seeds < 2:
        raise ConfigError(
            f"--seeds {seeds}: one run does not show how much runs vary by chance; give at least "
            "2, better 3"
        )
    if metric not in METRICS:
        raise ConfigError(f"--metric {metric}: must be one of {', '.join(METRICS)}")
    if not 0.5 <= confidence < 1:
        raise ConfigError(
            f"--confidence {confidence:g}: must be at least 0.5 and below 1, such as 0.95"
        )
    if resamples < 100:
        raise ConfigError(f"resamples {resamples}: must be at least 100")


def _draws(images: int, number: int) -> np.ndarray:
    """Return how often each image is in the test split itself (once) and in each bootstrap draw.

    The draws are always the same, so that all experiments and comparisons share them.

    Returns:
        (1 + number, images).
    """
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=number)
    return np.concatenate([np.ones((1, images), draws.dtype), draws]).astype(np.float64)


def _run(entry: _Entry, seed: int, title: str, count: str, is_base: bool) -> Iterator[str]:
    experiment = replace(entry.experiment, train=replace(entry.experiment.train, seed=seed))
    run = finished_run(experiment, entry.code)
    if run is not None:
        yield f"{title}: finished in {run}"
    else:
        for outdated in outdated_runs(experiment, entry.code):
            yield f"{title}: {outdated} is of other code and not reused"
        yield f"{title}: training, {count}"
        try:
            run = train_run(experiment, entry.code)
        except (DivergedError, RuntimeError) as error:
            # Out of memory is a RuntimeError. If an idea fails, the others continue.
            if is_base:
                raise ValueError(f"{title}: {error}") from error
            entry.ended = f"seed {seed + 1} failed: {' '.join(str(error).split())[:200]}"
            yield f"{title}: {entry.ended}"
            return
    entry.runs.append(run)


def _score(entry: _Entry, index: Index, truth: Sequence[GroundTruth], weights: np.ndarray) -> None:
    saved = run_detections(entry.runs[-1], entry.experiment, index)
    entry.detections.append(saved)
    classes = len(index.classes)
    matches = voc_matches(saved.detections, truth, classes)
    entry.lost.append(tide(saved.detections, truth, classes).lost)
    entry.values["AP50"].append(weighted_area_ap(matches, weights))
    matches = match_coco(saved.detections, truth, classes)
    entry.values["AP"].append(weighted_coco_ap(matches, weights))


def _too_few(index: Index) -> str:
    """Return why the test split's images are too few for a verdict, or ""."""
    if len(index) >= FEWEST_IMAGES:
        return ""
    return (
        f"{index.root} ({index.split}) has {len(index)} image{'s'[: len(index) > 1]}, too few to "
        f"tell how much images vary; give at least {FEWEST_IMAGES}, better 60"
    )


def _prune(
    entries: Sequence[_Entry], images: int, metric: str, confidence: float, looks: int
) -> Iterator[str]:
    for entry in entries[1:]:
        if entry.ended:
            continue
        found = _difference(entries[0], entry, metric, images)
        if should_prune(found, confidence, looks):
            entry.ended, entry.dropped = f"dropped after {len(entry.runs)} seeds", True
            yield f"{entry.experiment.name}: {entry.ended}: {_no_better(found)}"


def _no_better(found: Difference) -> str:
    return f"not better than the base with {100 * (1 - found.helps):.4g} % confidence"


def _difference(base: _Entry, idea: _Entry, metric: str, images: int) -> Difference:
    of_idea = idea.scores(metric)
    return difference(base.scores(metric).first(len(of_idea.observed)), of_idea, images)


def _report(
    plan: Plan, entries: Sequence[_Entry], metric: str, confidence: float, index: Index
) -> Report:
    base, ideas = entries[0], entries[1:]
    complete = [entry for entry in entries if len(entry.runs) > 1]
    costs, where = measure_costs(
        [entry.experiment for entry in complete],
        {entry.experiment.name: entry.runs[0] for entry in complete},
        plan.folder / "costs.json",
    )
    outcomes = []
    for entry in entries:
        has_difference = entry in complete and entry is not base and not _too_few(index)
        found = {m: _difference(base, entry, m, len(index)) for m in METRICS if has_difference}
        outcomes.append(
            Outcome(
                name=entry.experiment.name,
                file=str(plan.files[entries.index(entry)]),
                epochs=entry.experiment.train.epochs,
                runs=[str(run) for run in entry.runs],
                scores={m: np.array([v[0] for v in entry.values[m]]).tolist() for m in METRICS},
                differences=found,
                verdict=None
                if entry is base
                else _verdict(
                    base, entry, found.get(metric), metric, confidence, len(ideas), _too_few(index)
                ),
                lost=entry.mean_lost,
                training_speed=_speed_ratio(base, entry),
                cost=costs.get(entry.experiment.name),
            )
        )
    return Report(
        outcomes=outcomes,
        metric=metric,
        confidence=confidence,
        budget=plan.budget.text,
        images=len(index),
        data=f"{index.root} ({index.split})",
        timed_on=where,
    )


def _changes(
    base: _Entry, idea: _Entry, index: Index, truth: Sequence[GroundTruth], folder: Path
) -> Iterator[str]:
    """Yield the images on which an idea's first run differs most from the base's; draw them."""
    if not idea.detections or base.detections[0].same_as(idea.detections[0]):
        return
    names = [entry.experiment.name for entry in (base, idea)]
    yield ""
    yield f"{names[1]} compared with {names[0]}, first seed"
    found, by_idea = (entry.detections[0].detections for entry in (base, idea))
    changes = compare_errors(found, by_idea, truth, len(index.classes))
    yield from image_change_lines(changes, index, names, folder / names[1])


def _verdict(
    base: _Entry,
    idea: _Entry,
    found: Difference | None,
    metric: str,
    confidence: float,
    ideas: int,
    too_few: str,
) -> Verdict:
    if found is None:
        return Verdict("can't tell yet", idea.ended or too_few)
    pairs = list(zip(base.detections, idea.detections, strict=False))
    if not any(len(image.scores) for pair in pairs for saved in pair for image in saved.detections):
        return Verdict("can't tell yet", "no run detects anything yet; give a larger --budget")
    same = [of_base.same_as(of_idea) for of_base, of_idea in pairs]
    if all(same):
        return Verdict("the same", f"all {len(same)} runs detect exactly what the base's do")
    verdict = make_verdict(found, confidence, ideas, metric)
    if idea.dropped:
        reason = f"{idea.ended.removeprefix('dropped ')}; {_no_better(found)}"
        return replace(verdict, kind="dropped", reason=reason, more_seeds=None)
    if idea.ended:
        return replace(verdict, kind="can't tell yet", reason=idea.ended, more_seeds=None)
    return verdict


def _speed_ratio(base: _Entry, idea: _Entry) -> float | None:
    """Return an idea's training speed relative to the base, the median over seeds."""
    pairs = [
        (training_speed(of_base), training_speed(of_idea))
        for of_base, of_idea in zip(base.runs, idea.runs, strict=False)
    ]
    ratios = [own / of_base for of_base, own in pairs if own and of_base]
    return float(np.median(ratios)) if ratios else None
