"""The results of the zoo as tables: every model, and every family."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from tinydet.atomic import write_text
from tinydet.reparam.zoo import ZooRow

_COUNTS = ("norms", "branches", "scales")


def write_tables(rows: Sequence[ZooRow], folder: Path) -> None:
    """Write `table.md` (a line a model), `summary.md` (a line a family) and `table.csv`."""
    write_text(folder / "table.md", _model_table(rows) + "\n")
    write_text(folder / "summary.md", summary(rows) + "\n")
    write_text(folder / "table.csv", _csv(rows))


def row_line(row: ZooRow) -> str:
    """Return one model's result as a line of text."""
    if row.error:
        return f"FAILED  {row.model}: {row.error}"
    counts = ", ".join(f"{what} {_before(row, what)} -> {_after(row, what)}" for what in _COUNTS)
    told = f"{row.model}: {counts}, differs by {row.error64:.0e}, {row.seconds:.0f} s"
    return f"FAILED  {told}: {row.problem}" if row.problem else f"fine    {told}"


def summary(rows: Sequence[ZooRow]) -> str:
    """Return the results by family, the reasons of the norms that stay, and what went wrong."""
    folded = [row for row in rows if not row.error]
    lines = [_in_words(rows, folded), ""]
    lines += [_family_table(folded), ""] if folded else []
    kept: Counter[str] = Counter()
    for row in folded:
        kept.update(row.kept)
    if kept:
        reasons = [[str(count), reason] for reason, count in kept.most_common()]
        lines += [_markdown(["stay", "because"], reasons), ""]
    problems = [f"- {row.model}: {row.problem}" for row in rows if row.problem]
    return "\n".join(lines + (["Not right:", "", *problems] if problems else [])).strip()


def _in_words(rows: Sequence[ZooRow], folded: Sequence[ZooRow]) -> str:
    right = sum(not row.problem for row in rows)
    families = len({row.family for row in rows})
    counts = ", ".join(
        f"{sum(_before(r, w) for r in folded):,} -> {sum(_after(r, w) for r in folded):,} {w}"
        for w in _COUNTS
    )
    return f"{right} of {len(rows)} models of {families} families folded without a fault: {counts}."


def _family_table(folded: Sequence[ZooRow]) -> str:
    groups = {name: [r for r in folded if r.family == name] for name in {r.family for r in folded}}
    lines = [_family_cells(name, group) for name, group in sorted(groups.items())]
    lines.append(_family_cells("all", folded))
    header = ["family", "models", "norms", "left", "no batch norm"]
    header += ["branches", "left", "scales", "left", "error f64", "error f32"]
    return _markdown(header, lines)


def _family_cells(name: str, group: Sequence[ZooRow]) -> list[str]:
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


def _model_table(rows: Sequence[ZooRow]) -> str:
    header = ["model", "family", "input", "norms", "left", "no batch norm", "branches", "left"]
    header += ["scales", "left", "error f64", "error f32", "unfolded f32"]
    header += ["M multiply-adds", "after", "M parameters", "after", "problem"]
    return _markdown(header, [_model_cells(row) for row in rows])


def _model_cells(row: ZooRow) -> list[str]:
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


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that is also a table to the eye; numbers to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(c[:1].isdigit() or not c for c in column) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(cells, widths, right, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def _csv(rows: Sequence[ZooRow]) -> str:
    file = io.StringIO()
    names = [field.name for field in fields(ZooRow)]
    writer = csv.DictWriter(file, [*names, "problem"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        kept = "; ".join(f"{count} {reason}" for reason, count in row.kept.items())
        size = "x".join(map(str, row.other_size or ()))
        cells = {"kept": kept, "other_size": size, "problem": row.problem}
        writer.writerow({**asdict(row), **cells})
    return file.getvalue()


def _before(row: ZooRow, what: str) -> int:
    return int(getattr(row, f"{what}_before"))


def _after(row: ZooRow, what: str) -> int:
    return int(getattr(row, f"{what}_after"))
