"""The results of folding many models as tables: by model and by family."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from fold_row import FoldRow

from tinydet.atomic import write_text
from tinydet.report.table import markdown_table

_COUNTS = ("norms", "branches", "scales")
_FAMILY_HEADER = [
    *("family", "models", "norms", "left", "no batch norm"),
    *("branches", "left", "scales", "left", "error f64", "error f32"),
]
_MODEL_HEADER = [
    *("model", "family", "input", "norms", "left", "no batch norm", "branches", "left"),
    *("scales", "left", "error f64", "error f32", "unfolded f32"),
    *("M multiply-adds", "after", "M parameters", "after"),
    *("CPU s", "peak MB", "float64 MB", "problem"),
]
_SLOWEST = 5  # models named in the summary
_SMALL = 50e6  # parameters
_SECONDS = 3.0  # that a small model should take at most


def write_tables(rows: Sequence[FoldRow], folder: Path) -> None:
    """Write `table.md` (a line a model), `summary.md` (a line a family) and `table.csv`."""
    cells = [_model_cells(row) for row in rows]
    table = markdown_table(_MODEL_HEADER, cells, right=range(2, len(_MODEL_HEADER) - 1))
    write_text(folder / "table.md", "\n".join(table) + "\n")
    write_text(folder / "summary.md", summary(rows) + "\n")
    write_text(folder / "table.csv", _csv(rows))


def row_line(row: FoldRow) -> str:
    """Return one model's result as a line of text."""
    if row.error:
        return f"FAILED  {row.model}: {row.error}"
    counts = ", ".join(f"{what} {_before(row, what)} -> {_after(row, what)}" for what in _COUNTS)
    line = f"{row.model}: {counts}, difference {row.error64:.0e}, {row.cpu_seconds:.1f} s"
    return f"FAILED  {line}: {row.problem}" if row.problem else f"ok      {line}"


def summary(rows: Sequence[FoldRow]) -> str:
    """Return the results by family, the reasons of the norms that remain, and the problems."""
    folded = [row for row in rows if not row.error]
    lines = [_in_words(rows, folded), ""]
    lines += [_cost_in_words(folded), ""] if folded else []
    lines += [*_family_table(folded), ""] if folded else []
    kept: Counter[str] = Counter()
    for row in folded:
        kept.update(row.kept)
    if kept:
        reasons = [[str(count), reason] for reason, count in kept.most_common()]
        lines += [*markdown_table(["stay", "because"], reasons, right=[0]), ""]
    problems = [f"- {row.model}: {row.problem}" for row in rows if row.problem]
    return "\n".join(lines + (["Problems:", "", *problems] if problems else [])).strip()


def _in_words(rows: Sequence[FoldRow], folded: Sequence[FoldRow]) -> str:
    right = sum(not row.problem for row in rows)
    families = len({row.family for row in rows})
    counts = ", ".join(
        f"{sum(_before(r, w) for r in folded):,} -> {sum(_after(r, w) for r in folded):,} {w}"
        for w in _COUNTS
    )
    return (
        f"{right} of {len(rows)} models of {families} families folded without a problem: {counts}."
    )


def _cost_in_words(folded: Sequence[FoldRow]) -> str:
    total = sum(row.cpu_seconds for row in folded)
    slowest = sorted(folded, key=lambda row: -row.cpu_seconds)[:_SLOWEST]
    small = [row for row in folded if row.params_before <= _SMALL]
    slow = sum(row.cpu_seconds > _SECONDS for row in small)
    peaks = [row.peak_mb for row in folded if row.peak_mb is not None]
    weights = sum(row.float64_mb for row in folded)
    memory = f", and {sum(peaks):,.0f} MB of memory for {weights:,.0f} MB of weights in float64"
    return (
        f"`fold` took {total:,.0f} CPU seconds{memory if peaks else ''}, all models added up. "
        f"{slow} of the {len(small)} models of up to {_SMALL / 1e6:.0f} M parameters took more "
        f"than {_SECONDS:g} s. Slowest: "
        + ", ".join(f"{row.model} {row.cpu_seconds:.1f} s" for row in slowest)
        + "."
    )


def _family_table(folded: Sequence[FoldRow]) -> list[str]:
    groups = {name: [r for r in folded if r.family == name] for name in {r.family for r in folded}}
    lines = [_family_cells(name, group) for name, group in sorted(groups.items())]
    lines.append(_family_cells("all", folded))
    return markdown_table(_FAMILY_HEADER, lines, right=range(1, len(_FAMILY_HEADER)))


def _family_cells(name: str, group: Sequence[FoldRow]) -> list[str]:
    def total(values: Iterable[int]) -> str:
        return f"{sum(values):,}"

    return [
        name,
        str(len(group)),
        total(row.norms_before for row in group),
        total(row.norms_after for row in group),
        total(row.norms_never for row in group),
        total(row.branches_before for row in group),
        total(row.branches_after for row in group),
        total(row.scales_before for row in group),
        total(row.scales_after for row in group),
        f"{max(row.error64 for row in group):.0e}",
        f"{max(row.error32 for row in group):.0e}",
    ]


def _model_cells(row: FoldRow) -> list[str]:
    if row.error:
        return [row.model, row.family, *[""] * (len(_MODEL_HEADER) - 3), row.error]
    counts = [row.norms_before, row.norms_after, row.norms_never]
    counts += [row.branches_before, row.branches_after, row.scales_before, row.scales_after]
    errors = [row.error64, row.error32, row.baseline32]
    sizes = [row.macs_before, row.macs_after, row.params_before, row.params_after]
    return [
        row.model,
        row.family,
        str(row.input),
        *(str(count) for count in counts),
        *(f"{error:.0e}" for error in errors),
        *(f"{size / 1e6:.2f}" for size in sizes),
        f"{row.cpu_seconds:.1f}",
        "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
        f"{row.float64_mb:.0f}",
        row.problem,
    ]


def _csv(rows: Sequence[FoldRow]) -> str:
    file = io.StringIO()
    names = [field.name for field in fields(FoldRow)]
    writer = csv.DictWriter(file, [*names, "problem"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        kept = "; ".join(f"{count} {reason}" for reason, count in row.kept.items())
        sizes = " ".join(f"{height}x{width}" for height, width in row.other_sizes)
        cells = {"kept": kept, "other_sizes": sizes, "problem": row.problem}
        writer.writerow({**asdict(row), **cells})
    return file.getvalue()


def _before(row: FoldRow, what: str) -> int:
    return int(getattr(row, f"{what}_before"))


def _after(row: FoldRow, what: str) -> int:
    return int(getattr(row, f"{what}_after"))
