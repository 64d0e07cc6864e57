"""The experiments side by side: a table for people, JSON for scripts, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from tinydet.atomic import write_text
from tinydet.report.figures import Point, draw_scatter, save_figure
from tinydet.training.results import write_json

_HEADER = (
    "experiment", "input", "M parameters", "folded", "G multiply-adds", "folded", "ms folded",
    "AP50", "on", "command",
)  # fmt: skip
_NONE = "-"


@dataclass(frozen=True)
class ZooRow:
    """One experiment; None is what was not measured.

    Attributes:
        experiment: its name.
        file: its file.
        command: trains it, as it was trained if it was.
        size: (H, W) of the input in pixels that is counted and timed.
        params_training: parameters in training form.
        params_deploy: parameters folded.
        macs_training: multiply-adds of one image in training form, as torch counts them.
        macs_deploy: the same, folded.
        counters_training: how far thop agrees with torch's count.
        counters_deploy: the same, folded.
        latency_ms: median milliseconds of the folded detector, forward and post-processing.
        images: how many were timed.
        ap50: of the newest finished run and of the same with other seeds, in 0..1.
        data: what it was measured on.
        run: the newest run's folder.
        error: why there is no figure; empty if there are.
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


def write_zoo(rows: Sequence[ZooRow], where: str, folder: Path) -> list[Path]:
    """Write `experiments.md`, `experiments.json` and, of what was measured, `accuracy.png`.

    Args:
        rows: a row an experiment.
        where: the machine that timed them.
        folder: where to; it exists.

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
        plot.unlink(missing_ok=True)  # It showed what is measured no more.
        return [text, numbers]
    figure = draw_scatter(points, "milliseconds an image, folded", "AP50 in %", where)
    save_figure(figure, plot)
    return [text, numbers, plot]


def accuracy_points(rows: Sequence[ZooRow]) -> list[Point]:
    """Return AP50 in per cent over milliseconds for the rows that have both."""
    return [
        Point(row.experiment, row.latency_ms, 100 * mean(row.ap50), row.data, _spread(row.ap50))
        for row in rows
        if row.latency_ms is not None and row.ap50
    ]


def percent(ap50: Sequence[float]) -> str:
    """Return AP50 in per cent; of several seeds the mean, its standard deviation, their number."""
    if len(ap50) < 2:
        return f"{100 * ap50[0]:.1f}" if ap50 else _NONE
    return f"{100 * mean(ap50):.1f} ± {_spread(ap50):.1f} ({len(ap50)})"


def _spread(ap50: Sequence[float]) -> float:
    return 100 * stdev(ap50) if len(ap50) > 1 else 0.0


def markdown(rows: Sequence[ZooRow], where: str) -> str:
    """Return the rows as a Markdown table with a legend above it."""
    lines = [
        f"Timed on {where}: one image at a time, forward and post-processing, random weights.",
        "AP50 in % is that of the newest finished run of the same network, which the command "
        "repeats; of several seeds (--seed) the mean ± the standard deviation of one and their "
        f"number; {_NONE} is not measured.",
        "",
        _line(_HEADER),
        _line(["---"] + ["---:"] * 7 + ["---"] * 2),
        *(_line(_cells(row)) for row in rows),
    ]
    counters = [
        f"- {row.experiment}{form}: {told}"
        for row in rows
        for form, told in (("", row.counters_training), (", folded", row.counters_deploy))
        if told
    ]
    if counters:
        lines += ["", "Multiply-adds are torch's count; thop's beside it:", "", *counters]
    failed = [f"- {row.experiment}: {row.error}" for row in rows if row.error]
    return "\n".join(lines + (["", "Not right:", "", *failed] if failed else []))


def _cells(row: ZooRow) -> list[str]:
    return [
        row.experiment,
        f"{row.size[0]}x{row.size[1]}" if row.size else _NONE,
        _number(row.params_training, 1e-6),
        _number(row.params_deploy, 1e-6),
        _number(row.macs_training, 1e-9),
        _number(row.macs_deploy, 1e-9),
        _number(row.latency_ms),
        percent(row.ap50),
        row.data or _NONE,
        f"`{row.command}`",
    ]


def _number(value: float | None, factor: float = 1.0) -> str:
    return _NONE if value is None else f"{value * factor:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
