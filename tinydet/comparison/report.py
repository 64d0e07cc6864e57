"""The result of a comparison: tables for the terminal and in Markdown, JSON, and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from tinydet.atomic import write_text
from tinydet.comparison.cost import Cost
from tinydet.comparison.uncertainty import Difference
from tinydet.comparison.verdict import Verdict, single_confidence
from tinydet.evaluation.tide import KINDS
from tinydet.report.figures import Point, draw_scatter, save_figure
from tinydet.report.table import markdown_table, text_table
from tinydet.training.results import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NONE = "-"
Table = tuple[list[str], list[list[str]]]  # header and rows


@dataclass(frozen=True)
class Outcome:
    """The result of one experiment.

    Attributes:
        name: experiment name.
        file: experiment file.
        epochs: epochs of each run.
        runs: run folders, one for each seed.
        scores: for each metric, one value for each seed.
        differences: for each metric, the difference from the base; empty for the base itself, and
            with fewer than two runs.
        verdict: None for the base.
        lost: AP50 that each kind of error costs (`tinydet.evaluation.tide`), mean over seeds.
        training_speed: images per second in training, relative to the base.
        cost: cost of the folded network.
    """

    name: str
    file: str
    epochs: int
    runs: list[str]
    scores: dict[str, list[float]]
    differences: dict[str, Difference]
    verdict: Verdict | None
    lost: dict[str, float]
    training_speed: float | None
    cost: Cost | None


@dataclass(frozen=True)
class Report:
    """The result of a comparison.

    Attributes:
        outcomes: one for each experiment, the base first.
        metric: the metric that the verdicts are about.
        confidence: probability that none of them is wrong.
        budget: budget of each run, as given.
        images: number of test images.
        data: the test split.
        timed_on: the machine that the folded networks were timed on.
    """

    outcomes: list[Outcome]
    metric: str
    confidence: float
    budget: str
    images: int
    data: str
    timed_on: str

    @property
    def single_confidence(self) -> float:
        """The confidence of each interval."""
        return single_confidence(self.confidence, len(self.outcomes) - 1)


def report_lines(report: Report) -> list[str]:
    """Return the result as lines for a terminal."""
    lines = [""]
    for header, rows in _tables(report):
        lines += [*text_table(header, rows), ""]
    lines += [f"{o.name}: {o.verdict.line()}" for o in report.outcomes if o.verdict]
    return [*lines, "", *_legend(report)]


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `comparison.md`, `comparison.json` and, if anything was timed, `comparison.png`.

    Returns:
        The files written.
    """
    text, numbers, plot = (folder / f"comparison.{ending}" for ending in ("md", "json", "png"))
    write_text(text, markdown(report) + "\n")
    write_json(numbers, as_json(report))
    if not any(outcome.cost and outcome.cost.ms for outcome in report.outcomes):
        plot.unlink(missing_ok=True)  # of an earlier report
        return [text, numbers]
    save_figure(draw_report(report), plot)
    return [text, numbers, plot]


def markdown(report: Report) -> str:
    """Return the result in Markdown."""
    lines = [f"# {report.outcomes[0].name} and its ideas", ""]
    lines += [
        f"- **{o.name}** is {o.verdict.line()}"
        if o.verdict.kind in ("better", "worse", "the same")
        else f"- **{o.name}**: {o.verdict.line()}"
        for o in report.outcomes
        if o.verdict
    ]
    for header, rows in _tables(report):
        lines += ["", *markdown_table(header, rows, right=range(1, len(header)))]
    return "\n".join([*lines, "", *(f"{line}  " for line in _legend(report))])


def as_json(report: Report) -> dict[str, Any]:
    """Return the result as plain data; differences are fractions."""
    return {
        "metric": report.metric,
        "confidence": report.confidence,
        "interval_confidence": report.single_confidence,
        "budget": report.budget,
        "data": report.data,
        "images": report.images,
        "timed_on": report.timed_on,
        "experiments": [_outcome_json(outcome, report) for outcome in report.outcomes],
    }


def _outcome_json(outcome: Outcome, report: Report) -> dict[str, Any]:
    differences = {}
    for metric, found in outcome.differences.items():
        low, high = found.interval(report.single_confidence)
        differences[metric] = {
            "estimate": found.estimate,
            "low": low,
            "high": high,
            "probability_it_helps": found.helps,
            "image_variance": found.image_variance,
            "seed_variances": list(found.seed_variances),
        }
    verdict = outcome.verdict
    cost = outcome.cost
    return {
        "name": outcome.name,
        "file": outcome.file,
        "epochs": outcome.epochs,
        "runs": outcome.runs,
        "scores": outcome.scores,
        "differences": differences,
        "verdict": verdict
        and {"kind": verdict.kind, "reason": verdict.reason, "more_seeds": verdict.more_seeds},
        "AP50_lost": outcome.lost,
        "training_speed_ratio": outcome.training_speed,
        "params": cost and cost.params,
        "multiply_adds": cost and cost.multiply_adds,
        "ms": cost and cost.ms,
        "ms_interval": cost and cost.ms_interval,
        "latency_ratio": cost and cost.ratio,
        "latency_ratio_interval": cost and cost.ratio_interval,
        "cost_problem": cost.problem if cost else "",
    }


def draw_report(report: Report) -> Figure:
    """Return a plot of accuracy over deployed latency, with intervals and the Pareto front.

    The vertical error bar is the interval of the difference from the base, drawn around the
    idea's own value. The base has none, as the interval is that of a difference.
    """
    points = []
    for outcome in report.outcomes:
        cost, values = outcome.cost, outcome.scores[report.metric]
        if cost is None or cost.ms is None:
            continue
        y, y_bar = 100 * mean(values), None
        if outcome.differences:
            found = outcome.differences[report.metric]
            low, high = found.interval(report.single_confidence)
            bottom, top = (y + 100 * (end - found.estimate) for end in (low, high))
            y_bar = max(bottom, 0.0), min(top, 100.0)
        kind = outcome.verdict.kind if outcome.verdict else "base"
        points.append(Point(outcome.name, cost.ms, y, kind, x_bar=cost.ms_interval, y_bar=y_bar))
    bars = f"{100 * report.single_confidence:.3g} % interval of the difference from the base"
    return draw_scatter(
        points,
        f"milliseconds per image, folded (bars: 95 % interval of the median)\n{report.timed_on}",
        f"{report.metric} in % on {Path(report.data.split(' (')[0]).name}\n(bars: {bars})",
        front=True,
    )


def _tables(report: Report) -> list[Table]:
    return [_accuracy_table(report), _error_table(report), _cost_table(report)]


def _accuracy_table(report: Report) -> Table:
    others = [m for m in report.outcomes[0].scores if m != report.metric]
    metrics = [report.metric, *others]
    header, rows = ["experiment", "seeds", "epochs"], []
    for metric in metrics:
        header += [f"{metric} %", "difference (interval)", "helps"]
    for outcome in report.outcomes:
        cells = [outcome.name, str(len(outcome.runs)), str(outcome.epochs)]
        for metric in metrics:
            cells.append(_percent(outcome.scores[metric]))
            found = outcome.differences.get(metric)
            if found is None:
                cells += [_NONE, _NONE]
            else:
                low, high = (100 * end for end in found.interval(report.single_confidence))
                cells.append(f"{100 * found.estimate:+.1f} ({low:+.1f} to {high:+.1f})")
                cells.append(_probability(found.helps))
        rows.append(cells)
    return header, rows


def _error_table(report: Report) -> Table:
    return ["AP50 points lost to", *KINDS], [
        [outcome.name, *(_number(outcome.lost.get(kind), 100) for kind in KINDS)]
        for outcome in report.outcomes
    ]


def _cost_table(report: Report) -> Table:
    header = ["experiment", "ms folded", "ratio (interval)", "M parameters", "G multiply-adds"]
    rows = []
    for outcome in report.outcomes:
        cost = outcome.cost or Cost()
        ratio = _NONE
        if cost.ratio is not None:
            ratio = f"{cost.ratio:.2f}"
            if cost.ratio_interval and outcome.verdict:
                ratio += " ({:.2f} to {:.2f})".format(*cost.ratio_interval)
        rows.append(
            [
                outcome.name,
                _number(cost.ms),
                ratio,
                _number(cost.params, 1e-6),
                _number(cost.multiply_adds, 1e-9),
                _number(outcome.training_speed),
            ]
        )
    return [*header, "training img/s, ratio"], rows


def _legend(report: Report) -> list[str]:
    ideas = len(report.outcomes) - 1
    each = (
        f"; each interval has {100 * report.single_confidence:.4g} %, so that all {ideas} hold "
        f"together with {100 * report.confidence:.4g} %"
        if ideas > 1
        else ""
    )
    problems = [
        f"{o.name} could not be timed: {o.cost.problem}"
        for o in report.outcomes
        if o.cost and o.cost.problem
    ]
    return [
        f"Verdicts are about {report.metric}, at {100 * report.confidence:.4g} % confidence{each}.",
        f"{report.data}, {report.images} images. Budget of each run: {report.budget}. Scores of "
        "the last epoch: mean ± standard deviation between seeds. Differences are in points; "
        "helps: the probability that the true difference is above 0.",
        "The test images are assumed to be independent. If they are alike (video frames, near "
        'duplicates), "better" and "worse" are reported too often: keep one of each group.',
        "AP50 points lost: what fixing all errors of one kind, and no others, would gain (TIDE).",
        f"Folded networks timed in turns on {report.timed_on}.",
        *problems,
    ]


def _percent(values: Sequence[float]) -> str:
    if not values:
        return _NONE
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def _probability(value: float) -> str:
    if value > 0.999:
        return "> 99.9 %"
    return "< 0.1 %" if value < 0.001 else f"{100 * value:.1f} %"


def _number(value: float | None, factor: float = 1.0) -> str:
    return _NONE if value is None or math.isnan(value) else f"{value * factor:.2f}"
