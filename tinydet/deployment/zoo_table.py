"""The table of all experiments: Markdown, JSON and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from tinydet.atomic import write_text
from tinydet.report.figures import Point, draw_scatter, save_figure
from tinydet.report.table import markdown_table
from tinydet.training.results import write_json

_HEADER = (
    "experiment", "input", "M parameters", "folded", "G multiply-adds", "folded", "ms folded",
    "AP50", "on", "command",
)  # fmt: skip
_NONE = "-"


@dataclass(frozen=True)
class ExperimentRow:
    """One experiment; None stands for what was not measured.

    Attributes:
        experiment: its name.
        file: its file.
        command: trains it; if there are past runs, as they were trained.
        size: (H, W) of the input in pixels, for counts and times.
        params_training: parameters in training form.
        params_deploy: parameters folded.
        macs_training: multiply-adds of one image in training form, counted by torch.
        macs_deploy: the same, folded.
        counters_training: how thop's count compares with torch's.
        counters_deploy: the same, folded.
        latency_ms: median milliseconds of the folded detector, forward and post-processing.
        images: number of images timed.
        ap50: of the newest finished run and its repetitions with other seeds, in 0..1.
        data: the data set and split of `ap50`.
        run: the newest run's folder.
        error: why there are no figures; empty if there are.
    """

    experiment: str
    file: str
    command: str
    size: tuple[int, int] | None = None
    params_training: int | None = None
    params_deploy: int | None = None
    macs_training: int | None = None
    macs_deploy: int | None = None
    counters_training: str = ""
    counters_deploy: str = ""
    latency_ms: float | None = None
    images: int = 0
    ap50: list[float] = field(default_factory=list)
    data: str = ""
    run: str = ""
    error: str = ""


def write_zoo(rows: Sequence[ExperimentRow], where: str, folder: Path) -> list[Path]:
    """Write `experiments.md`, `experiments.json` and, if any AP50 is known, `accuracy.png`.

    Args:
        rows: one per experiment.
        where: the machine that timed them.
        folder: for the files; it must exist.

    Returns:
        The files written.
    """
    text, numbers, plot = (
        folder / f for f in ("experiments.md", "experiments.json", "accuracy.png")
    )
    write_text(text, markdown(rows, where) + "\n")
    write_json(numbers, {"where": where, "rows": [asdict(row) for row in rows]})
    points = accuracy_points(rows)
    if not points:
        plot.unlink(missing_ok=True)  # An older one is out of date.
        return [text, numbers]
    figure = draw_scatter(points, "milliseconds per image, folded", "AP50 in %", where)
    save_figure(figure, plot)
    return [text, numbers, plot]


def accuracy_points(rows: Sequence[ExperimentRow]) -> list[Point]:
    """Return AP50 in percent over milliseconds for the rows that have both."""
    points = []
    for row in rows:
        if row.latency_ms is not None and row.ap50:
            y, spread = 100 * mean(row.ap50), _spread(row.ap50)
            bar = (y - spread, y + spread) if spread else None
            points.append(Point(row.experiment, row.latency_ms, y, row.data, y_bar=bar))
    return points


def percent(ap50: Sequence[float]) -> str:
    """Return AP50 in percent; for several seeds mean ± standard deviation (number of seeds)."""
    if len(ap50) < 2:
        return f"{100 * ap50[0]:.1f}" if ap50 else _NONE
    return f"{100 * mean(ap50):.1f} ± {_spread(ap50):.1f} ({len(ap50)})"


def _spread(ap50: Sequence[float]) -> float:
    return 100 * stdev(ap50) if len(ap50) > 1 else 0.0


def markdown(rows: Sequence[ExperimentRow], where: str) -> str:
    """Return a Markdown page: the rows as a table, with explanations."""
    lines = [
        f"Timed on {where}: one image at a time, forward and post-processing, random weights.",
        "AP50 in % is from the newest finished run of the same network, which the command repeats; "
        "for several seeds (--seed) the mean ± the standard deviation of one, and their number; "
        f"{_NONE} is not measured.",
        "",
        *markdown_table(_HEADER, [_cells(row) for row in rows], right=range(1, 8)),
    ]
    counters = [
        f"- {row.experiment}{form}: {line}"
        for row in rows
        for form, line in (("", row.counters_training), (", folded", row.counters_deploy))
        if line
    ]
    if counters:
        lines += ["", "Multiply-adds are torch's count; thop's for comparison:", "", *counters]
    failed = [f"- {row.experiment}: {row.error}" for row in rows if row.error]
    return "\n".join(lines + (["", "Failed:", "", *failed] if failed else []))


def _cells(row: ExperimentRow) -> list[str]:
    return [
        row.experiment,
        f"{row.size[0]}x{row.size[1]}" if row.size else _NONE,
        number(row.params_training, 1e-6),
        number(row.params_deploy, 1e-6),
        number(row.macs_training, 1e-9),
        number(row.macs_deploy, 1e-9),
        number(row.latency_ms),
        percent(row.ap50),
        row.data or _NONE,
        f"`{row.command}`",
    ]


def number(value: float | None, factor: float = 1.0) -> str:
    """Return a multiple of a value with two decimals, or a dash if it is None."""
    return _NONE if value is None else f"{value * factor:.2f}"
