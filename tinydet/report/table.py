"""Tables of text: aligned columns for the screen, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_WIDEST = 10_000  # characters; a table is never wrapped or cut


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table for the screen: the first column is left-aligned, others right.

    Args:
        header: names of the columns.
        rows: cells, as many in each row as there are columns.
    """
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=_WIDEST, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
) -> list[str]:
    """Return the lines of a Markdown table.

    Args:
        header: names of the columns.
        rows: cells, as many in each row as there are columns.
        right: numbers of the columns that are right-aligned.
    """
    rule = ["---:" if i in right else "---" for i in range(len(header))]
    return [_markdown_row(header), _markdown_row(rule), *(_markdown_row(row) for row in rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
