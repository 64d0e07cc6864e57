"""What a comparison found, as tables for the terminal and Markdown, as JSON, and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from tinydet.atomic import write_text
from tinydet.comparison.price import Price
from tinydet.comparison.uncertainty import Difference
from tinydet.comparison.verdict import Verdict
from tinydet.evaluation.tide import KINDS
from tinydet.report.figures import Point, draw_scatter, save_figure
from tinydet.training.results import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NONE = "-"


@dataclass(frozen=True)
class Outcome:
    """What is known of one experiment.

    Attributes:
        name: of the experiment.
        file: of the experiment.
        epochs: that each run had.
        runs: folders, one a seed.
        scores: of each metric, a value a seed.
        differences: from the base, of each metric; empty for the base, and where there are not
            two runs.
        verdict: None for the base.
        lost: AP50 that each kind of error costs (`tinydet.evaluation.tide`), mean over seeds.
        training_speed: images per second in training, the base's being 1.
        price: of the folded network.
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
    price: Price | None


@dataclass(frozen=True)
class Report:
    """A comparison's result.

    Attributes:
        outcomes: the base first.
        metric: that the verdicts are about.
        confidence: that none of them is wrong.
        budget: of a run, as asked for.
        images: of the test split.
        data: the test split.
        timed_on: what the folded networks were timed on.
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
        """The confidence of each interval, so that all of them together have the one asked for."""
        return 1 - (1 - self.confidence) / (len(self.outcomes) - 1)


def report_lines(report: Report) -> list[str]:
    """Return the result as lines for a terminal."""
    lines = [""]
    for rows in _tables(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.append("")
    lines += [f"{o.name}: {o.verdict.line()}" for o in report.outcomes if o.verdict]
    return [*lines, "", *_legend(report)]


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `comparison.md`, `comparison.json` and, of what was timed, `comparison.png`.

    Returns:
        The files written.
    """
    text, numbers, plot = (folder / f"comparison.{ending}" for ending in ("md", "json", "png"))
    write_text(text, markdown(report) + "\n")
    write_json(numbers, as_json(report))
    if not any(outcome.price and outcome.price.ms for outcome in report.outcomes):
        plot.unlink(missing_ok=True)  # It showed what is timed no more.
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
    for rows in _tables(report):
        header, *body = rows
        lines += ["", _row(header), _row(["---"] + ["---:"] * (len(header) - 1))]
        lines += [_row(cells) for cells in body]
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
    price = outcome.price
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
        "params": price and price.params,
        "multiply_adds": price and price.multiply_adds,
        "ms": price and price.ms,
        "ms_interval": price and price.ms_interval,
        "latency_ratio": price and price.ratio,
        "latency_ratio_interval": price and price.ratio_interval,
        "price_problem": price.problem if price else "",
    }


def draw_report(report: Report) -> Figure:
    """Return a plot of accuracy over deployed latency, with intervals and the Pareto front.

    The bar along y is the interval of the difference from the base, about the idea's own value.
    The base itself has none: what is uncertain of all alike is no difference.
    """
    points = []
    for outcome in report.outcomes:
        price, values = outcome.price, outcome.scores[report.metric]
        if price is None or price.ms is None:
            continue
        y, y_bar = 100 * mean(values), None
        if outcome.differences:
            found = outcome.differences[report.metric]
            low, high = found.interval(report.single_confidence)
            ends = (y + 100 * (end - found.estimate) for end in (low, high))
            y_bar = tuple(min(max(end, 0.0), 100.0) for end in ends)
        kind = outcome.verdict.kind if outcome.verdict else "base"
        points.append(Point(outcome.name, price.ms, y, kind, x_bar=price.ms_interval, y_bar=y_bar))
    bars = f"{100 * report.single_confidence:.3g} % interval of the difference from the base"
    return draw_scatter(
        points,
        f"milliseconds an image, folded (bars: 95 % interval of the median)\n{report.timed_on}",
        f"{report.metric} in % on {Path(report.data.split(' (')[0]).name}\n(bars: {bars})",
        front=True,
    )


def _tables(report: Report) -> list[list[list[str]]]:
    return [_accuracy_rows(report), _error_rows(report), _price_rows(report)]


def _accuracy_rows(report: Report) -> list[list[str]]:
    others = [m for m in report.outcomes[0].scores if m != report.metric]
    metrics = [report.metric, *others]
    rows = [["experiment", "seeds", "epochs"]]
    for metric in metrics:
        rows[0] += [f"{metric} %", "difference (interval)", "helps"]
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
    return rows


def _error_rows(report: Report) -> list[list[str]]:
    rows = [["AP50 points lost to", *KINDS]]
    for outcome in report.outcomes:
        cells = [_number(outcome.lost.get(kind), 100) for kind in KINDS]
        rows.append([outcome.name, *cells])
    return rows


def _price_rows(report: Report) -> list[list[str]]:
    rows = [["experiment", "ms folded", "ratio (interval)", "M parameters", "G multiply-adds"]]
    rows[0].append("training img/s, ratio")
    for outcome in report.outcomes:
        price = outcome.price or Price()
        ratio = _NONE
        if price.ratio is not None:
            ratio = f"{price.ratio:.2f}"
            if price.ratio_interval and outcome.verdict:
                ratio += " ({:.2f} to {:.2f})".format(*price.ratio_interval)
        rows.append(
            [
                outcome.name,
                _number(price.ms),
                ratio,
                _number(price.params, 1e-6),
                _number(price.multiply_adds, 1e-9),
                _number(outcome.training_speed),
            ]
        )
    return rows


def _legend(report: Report) -> list[str]:
    ideas = len(report.outcomes) - 1
    together = (
        f"; each interval is of {100 * report.single_confidence:.4g} %, so that all {ideas} "
        f"together hold with {100 * report.confidence:.4g} %"
        if ideas > 1
        else ""
    )
    problems = [
        f"{o.name} is not timed: {o.price.problem}"
        for o in report.outcomes
        if o.price and o.price.problem
    ]
    return [
        f"Verdicts are about {report.metric}, at {100 * report.confidence:.4g} % confidence"
        f"{together}.",
        f"{report.data}, {report.images} images; a budget of {report.budget} a run; last epoch; "
        "mean ± standard deviation of a seed; differences in points; helps: the probability that "
        "the true difference is above 0.",
        "Test images count as independent. Where they are alike (frames of a video, near "
        'duplicates), "better" and "worse" are said too often: keep one of each group.',
        "AP50 lost: what mending all errors of one kind alone would win (TIDE).",
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


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
