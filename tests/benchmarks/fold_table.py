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
    *("M multiply-adds", "after", "M parameters", "after", "problem"),
]


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
    line = f"{row.model}: {counts}, difference {row.error64:.0e}, {row.seconds:.0f} s"
    return f"FAILED  {line}: {row.problem}" if row.problem else f"ok      {line}"


def summary(rows: Sequence[FoldRow]) -> str:
    """Return the results by family, the reasons of the norms that remain, and the problems."""
    folded = [row for row in rows if not row.error]
    lines = [_in_words(rows, folded), ""]
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
        return [row.model, row.family, *[""] * 15, row.error]
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
        row.problem,
    ]


def _csv(rows: Sequence[FoldRow]) -> str:
    file = io.StringIO()
    names = [field.name for field in fields(FoldRow)]
    writer = csv.DictWriter(file, [*names, "problem"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        kept = "; ".join(f"{count} {reason}" for reason, count in row.kept.items())
        size = "x".join(map(str, row.other_size or ()))
        cells = {"kept": kept, "other_size": size, "problem": row.problem}
        writer.writerow({**asdict(row), **cells})
    return file.getvalue()


def _before(row: FoldRow, what: str) -> int:
    return int(getattr(row, f"{what}_before"))


def _after(row: FoldRow, what: str) -> int:
    return int(getattr(row, f"{what}_after"))
