"""The AP50 that each kind of error costs, as lines to print and as plain numbers to write."""

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
# How the numbers differ from those of tidecv, the program of the paper's authors; see `tide`.
NOT_TIDECV = (
    "If fixing errors gives an object several detections, the one with the highest score counts,",
    "as in the paper; the tidecv package keeps one that was correct before. Of an example detector",
    "with an AP50 of 18.2, cls is 37.0 by this rule and 23.6 by tidecv's, loc 37.7 and 26.7.",
)
LEGEND = (
    "AP50 in %, and the AP50 points that fixing all errors of one kind, and no others, would gain:",
    "cls wrong class, loc poor localisation, both, dup duplicate, bkg background, miss missed",
    "object; all fp every false positive, all fn every false negative. They do not add up, because",
    "one error can hide another.",
    *NOT_TIDECV,
)


def tide_lines(result: Tide, classes: Sequence[str]) -> list[str]:
    """Return a table in percent: total, by object size, by class; "-" is undefined."""
    lines = _lines(_rows(result, classes), ".2f")
    return [*lines, f"AP50 is {UNDEFINED}"] if math.isnan(result.ap50) else lines


def tide_change_lines(base: Tide, idea: Tide, classes: Sequence[str]) -> list[str]:
    """Return the table of the idea minus that of the base: below 0, less is lost."""
    rows = [
        (name, [b - a for a, b in zip(before, after, strict=True)])
        for (name, before), (_, after) in zip(
            _rows(base, classes), _rows(idea, classes), strict=True
        )
    ]
    return _lines(rows, "+.2f")


def tide_as_dict(result: Tide, classes: Sequence[str]) -> dict[str, Any]:
    """Return plain numbers and names, None for NaN.

    "all" has what each kind costs by its name, "sizes" and "classes" such a dict for each.
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
    """Return the name, AP50 and cost of each kind of error for each row; sizes have no AP50."""
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


def _lines(rows: Sequence[tuple[str, list[float]]], form: str) -> list[str]:
    cells = [
        [name, *("-" if math.isnan(value) else format(100 * value, form) for value in values)]
        for name, values in rows
    ]
    return text_table(["", "AP50", *HEADS.values()], cells)
