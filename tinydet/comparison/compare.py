"""A comparison from beginning to end: plan, runs, verdicts, prices, files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tinydet.comparison.budget import parse_budget
from tinydet.comparison.error_analysis import image_change_lines
from tinydet.comparison.plan import Plan, load_experiments, make_plan
from tinydet.comparison.price import prices
from tinydet.comparison.report import Outcome, Report, report_lines, write_report
from tinydet.comparison.runs import finished_run, run_detections, train_run, training_speed
from tinydet.comparison.uncertainty import Difference, Scores, difference
from tinydet.comparison.verdict import Verdict, hopeless, judge, looks_of
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
class CompareOptions:
    """How to compare.

    Attributes:
        seeds: runs of each experiment, at least 2.
        budget: of each run, see `parse_budget`.
        metric: "AP50" or "AP", the one that the verdict is about.
        confidence: that no verdict of the comparison is wrong.
        halving: drop hopeless ideas after 2, 4, 8, ... seeds.
        resamples: draws of the images.
        folder: of the comparison; None is a new one in `runs/compare/`.
        overrides: "a.b=value" for every experiment.
    """

    seeds: int = 3
    budget: str = "20m"
    metric: str = "AP50"
    confidence: float = 0.95
    halving: bool = False
    resamples: int = 1000
    folder: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclass
class _Entry:
    """What has been found out about one experiment."""

    experiment: Experiment
    runs: list[Path] = field(default_factory=list)
    detections: list[SavedDetections] = field(default_factory=list)
    lost: list[dict[str, float]] = field(default_factory=list)  # to errors, of each seed
    values: dict[str, list[np.ndarray]] = field(default_factory=lambda: {m: [] for m in METRICS})
    ended: str = ""  # why no further seed of it is trained
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


def compare(files: Sequence[Path], options: CompareOptions) -> Iterator[str]:
    """Train experiments, judge them and write all that was found, yielding what to tell the user.

    Started again with the same options it goes on where it was.

    Args:
        files: of experiments, the base first.
        options: how.

    Raises:
        ValueError: an option or a file is wrong, the experiments cannot be compared, the test
            split has no object to find, or a run of the base has diverged.
    """
    _check(options)
    budget = parse_budget(options.budget)
    experiments = load_experiments(files, options.overrides)
    index = load_split(experiments[0].data, experiments[0].data.test_split)
    require_objects(index)
    plan = make_plan(files, experiments, budget, options.folder)
    yield f"comparison  {plan.folder}"
    for experiment, reason in zip(plan.experiments, plan.reasons, strict=True):
        epochs, dtype = experiment.train.epochs, experiment.train.dtype
        yield f"{experiment.name}: {epochs} epoch{'s'[: epochs > 1]} in {dtype} ({reason})"
    entries = [_Entry(experiment) for experiment in plan.experiments]
    truth, weights = ground_truth(index), _draws(len(index), options.resamples)
    for seed in range(options.seeds):
        for entry in entries:
            if not entry.ended:
                yield from _run(entry, seed, options.seeds, is_base=entry is entries[0])
            if not entry.ended:
                _score(entry, index, truth, weights)
        if options.halving and seed + 1 in looks_of(options.seeds):
            yield from _drop(entries, seed + 1, options)
    report = _report(plan, entries, options, index)
    yield from report_lines(report)
    yield from (f"wrote       {path}" for path in write_report(report, plan.folder))
    for idea in entries[1:]:
        yield from _changes(entries[0], idea, index, truth, plan.folder)


def _check(options: CompareOptions) -> None:
    if options.seeds < 2:
        raise ConfigError(
            f"--seeds {options.seeds}: one run does not tell how much runs differ by chance; give "
            "at least 2, better 3"
        )
    if options.metric not in METRICS:
        raise ConfigError(f"--metric {options.metric}: take one of {', '.join(METRICS)}")
    if not 0.5 <= options.confidence < 1:
        raise ConfigError(f"--confidence {options.confidence:g}: from 0.5 to below 1, such as 0.95")
    if options.resamples < 100:
        raise ConfigError(f"--resamples {options.resamples}: at least 100")


def _draws(images: int, number: int) -> np.ndarray:
    """Return how often each image is in the test split itself and in each of `number` draws.

    They are the same whenever and for whichever experiments they are drawn.
    """
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=number)
    return np.concatenate([np.ones((1, images), draws.dtype), draws]).astype(np.float64)


def _run(entry: _Entry, seed: int, seeds: int, is_base: bool) -> Iterator[str]:
    experiment = replace(entry.experiment, train=replace(entry.experiment.train, seed=seed))
    told = f"{experiment.name}, seed {seed + 1} of {seeds}"
    run = finished_run(experiment)
    if run is not None:
        yield f"{told}: finished in {run}"
    else:
        yield f"{told}: training"
        try:
            run = train_run(experiment)
        except (DivergedError, RuntimeError) as error:
            # Out of memory is a RuntimeError. It is the idea's own fault, and ends no other's.
            if is_base:
                raise ValueError(f"{told}: {error}") from error
            entry.ended = f"seed {seed + 1} failed: {' '.join(str(error).split())[:200]}"
            yield f"{told}: {entry.ended}"
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


def _drop(entries: Sequence[_Entry], seeds: int, options: CompareOptions) -> Iterator[str]:
    looks = len(looks_of(options.seeds))
    for entry in entries[1:]:
        if entry.ended:
            continue
        found = _difference(entries[0], entry, options.metric)
        if hopeless(found, options.confidence, looks):
            entry.ended, entry.dropped = f"dropped after {seeds} seeds", True
            yield (
                f"{entry.experiment.name}: {entry.ended}: it is no better than the base with "
                f"{100 * (1 - found.helps):.4g} % confidence"
            )


def _difference(base: _Entry, idea: _Entry, metric: str) -> Difference:
    of_idea = idea.scores(metric)
    return difference(base.scores(metric).first(len(of_idea.observed)), of_idea)


def _report(plan: Plan, entries: Sequence[_Entry], options: CompareOptions, index: Index) -> Report:
    base, ideas = entries[0], entries[1:]
    judged = [entry for entry in entries if len(entry.runs) > 1]
    priced, where = prices(
        [entry.experiment for entry in judged],
        {entry.experiment.name: entry.runs[0] for entry in judged},
        plan.folder / "price.json",
    )
    outcomes = []
    for entry in entries:
        of_idea = entry in judged and entry is not base
        found = {m: _difference(base, entry, m) for m in METRICS} if of_idea else {}
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
                else _verdict(base, entry, found, options, len(ideas)),
                lost=entry.mean_lost,
                training_speed=_speed_ratio(base, entry),
                price=priced.get(entry.experiment.name),
            )
        )
    return Report(
        outcomes=outcomes,
        metric=options.metric,
        confidence=options.confidence,
        budget=plan.budget.text,
        images=len(index),
        data=f"{index.root} ({index.split})",
        timed_on=where,
    )


def _changes(
    base: _Entry, idea: _Entry, index: Index, truth: Sequence[GroundTruth], folder: Path
) -> Iterator[str]:
    """Yield the images on which an idea's first run differs most from the base's, and draw them."""
    if not idea.detections or base.detections[0].same_as(idea.detections[0]):
        return
    names = [entry.experiment.name for entry in (base, idea)]
    found = [entry.detections[0].detections for entry in (base, idea)]
    yield ""
    yield f"{names[1]} beside {names[0]}, the first seed"
    changes = compare_errors(*found, truth, len(index.classes))
    yield from image_change_lines(changes, index, names, folder / names[1])


def _verdict(
    base: _Entry,
    idea: _Entry,
    found: dict[str, Difference],
    options: CompareOptions,
    ideas: int,
) -> Verdict:
    if not found:
        return Verdict("can't tell yet", float("nan"), float("nan"), idea.ended)
    pairs = list(zip(base.detections, idea.detections, strict=False))
    if not any(len(image.scores) for pair in pairs for saved in pair for image in saved.detections):
        reason = "no run finds anything yet; give a larger --budget"
        return Verdict("can't tell yet", float("nan"), float("nan"), reason)
    same = [of_base.same_as(of_idea) for of_base, of_idea in pairs]
    if all(same):
        runs = f"all {len(same)} runs"
        return Verdict("the same", 0.0, 0.0, f"{runs} find exactly what the base's find")
    on_metric = found[options.metric]
    verdict = judge(on_metric, options.confidence, ideas, options.metric)
    if idea.dropped:
        confidence = f"{100 * (1 - on_metric.helps):.4g} %"
        reason = f"{idea.ended.removeprefix('dropped ')}; no better than the base with {confidence}"
        return replace(verdict, kind="dropped", reason=f"{reason} confidence", more_seeds=None)
    if idea.ended:
        return replace(verdict, kind="can't tell yet", reason=idea.ended, more_seeds=None)
    return verdict


def _speed_ratio(base: _Entry, idea: _Entry) -> float | None:
    """Return the median over seeds of an idea's images per second in training, base = 1."""
    pairs = [
        (training_speed(of_base), training_speed(of_idea))
        for of_base, of_idea in zip(base.runs, idea.runs, strict=False)
    ]
    ratios = [own / of_base for of_base, own in pairs if own and of_base]
    return float(np.median(ratios)) if ratios else None
