"""The AP50 lost to each kind of error, as a text table and as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tinydet.evaluation.metrics import UNDEFINED
from tinydet.evaluation.tide import KINDS, SIZES, SUMS, Tide
from tinydet.report.table import text_table

HEADS = {
    "classification": "cls",
    "localisation": "loc",
    "both": "both",
    "duplicate": "dup",
    "background": "bkg",
    "missed": "miss",
    "false positive": "all fp",
    "false negative": "all fn",
}
# The difference from the paper authors' own program, see `tide`.
NOT_TIDECV = (
    "The highest-scoring detection of an object is corrected, as in the paper's text; the package",
    "tidecv keeps an existing true positive instead. For a weak detector with AP50 18.2, cls is",
    "37.0 here and 23.6 there, loc 37.7 and 26.7.",
)
LEGEND = (
    "AP50 in %, and the points gained by fixing all errors of one kind alone: cls wrong class, loc",
    "poor localization, both of them, dup duplicate, bkg background, miss missed; all fp is every",
    "false positive, all fn every false negative. They do not add up: one error may hide another.",
    *NOT_TIDECV,
)


def tide_lines(result: Tide, classes: Sequence[str]) -> list[str]:
    """Return a table in percent: overall, by object size and by class; "-" for NaN."""
    lines = _table(_rows(result, classes), ".2f")
    return [*lines, f"AP50 is {UNDEFINED}"] if math.isnan(result.ap50) else lines


def tide_change_lines(base: Tide, idea: Tide, classes: Sequence[str]) -> list[str]:
    """Return the table of idea minus base; a negative number means that less AP50 is lost."""
    rows = [
        (name, [b - a for a, b in zip(before, after, strict=True)])
        for (name, before), (_, after) in zip(
            _rows(base, classes), _rows(idea, classes), strict=True
        )
    ]
    return _table(rows, "+.2f")


def tide_as_dict(result: Tide, classes: Sequence[str]) -> dict[str, Any]:
    """Return the lost AP50 as plain numbers, None for NaN.

    "all" is a dict from kind to lost AP50; "sizes" and "classes" have one such dict for each.
    """
    return {
        "all": _plain(result.lost),
        "sizes": {size: _plain(lost) for size, lost in result.lost_by_size.items()},
        "classes": {
            name: _plain({kind: lost[k] for kind, lost in result.lost_per_class.items()})
            for k, name in enumerate(classes)
        },
    }


def _plain(lost: dict[str, float]) -> dict[str, float | None]:
    return {kind: None if math.isnan(v) else round(float(v), 6) for kind, v in lost.items()}


def _rows(result: Tide, classes: Sequence[str]) -> list[tuple[str, list[float]]]:
    """Return for each row its name, AP50 (NaN for sizes) and the AP50 lost to each kind."""
    kinds = KINDS + SUMS
    return [
        ("all", [result.ap50, *(result.lost[kind] for kind in kinds)]),
        *(
            (f"  {size}", [math.nan, *(result.lost_by_size[size][kind] for kind in kinds)])
            for size in SIZES
        ),
        *(
            (name, [result.ap50_per_class[k], *(result.lost_per_class[kind][k] for kind in kinds)])
            for k, name in enumerate(classes)
        ),
    ]


def _table(rows: Sequence[tuple[str, list[float]]], form: str) -> list[str]:
    cells = [
        [name, *("-" if math.isnan(v) else format(100 * v, form) for v in values)]
        for name, values in rows
    ]
    return text_table(("", "AP50", *HEADS.values()), cells)
