"""What each kind of error costs, as tables of a run's page."""

from __future__ import annotations

from tinydet.evaluation.tide_table import NOT_TIDECV
from tinydet.report.html import Markup, clip, element, join
from tinydet.report.run_files import LostAp

# Name in report.json, name on the page, short name, what it is.
_KINDS = (
    ("classification", "Classification", "cls", "right place, wrong class"),
    ("localisation", "Localisation", "loc", "right class, IoU 0.1 to 0.5"),
    ("both", "Both of these", "both", "wrong class, IoU 0.1 to 0.5"),
    ("duplicate", "Duplicate", "dup", "found already, more surely"),
    ("background", "Background", "bkg", "no object there"),
    ("missed", "Missed", "miss", "not found at all"),
)
_SUMS = (
    ("false positive", "All false positives"),
    ("false negative", "All false negatives"),
)
_NAME = 60  # characters shown of a name

LOST = (
    "Points of AP50 that mending all errors of one kind, and no others, would win; by the size of "
    "the object, small below 32 x 32 pixels and large above 96 x 96. They do not add up to what is "
    f"missing from 100 %: one error can hide another. {' '.join(NOT_TIDECV)}"
)


def lost_by_size(lost: LostAp) -> Markup | None:
    """Return what each kind costs, with bars."""
    if not lost.all:
        return None
    sizes = [lost.sizes.get(size, {}) for size in ("small", "medium", "large")]
    most = max((lost.all.get(kind, 0.0) for kind, *_ in _KINDS), default=0.0)
    rows = []
    for kind, name, short, what in _KINDS:
        head = element(
            "th",
            name,
            element("span", f"{short}: {what}", class_="note"),
            _bar(lost.all.get(kind, 0.0), most),
            scope="row",
        )
        rows.append(element("tr", head, *(_cell(part.get(kind)) for part in (lost.all, *sizes))))
    sums = [
        element(
            "tr",
            element("th", name, scope="row"),
            *(_cell(part.get(kind)) for part in (lost.all, *sizes)),
        )
        for kind, name in _SUMS
    ]
    titles = ("Kind", "All", "Small", "Medium", "Large")
    return _table(titles, rows, sums, "Kinds of errors")


def lost_by_class(lost: LostAp) -> Markup | None:
    """Return what each kind costs each class."""
    if not lost.classes:
        return None
    rows = [
        element(
            "tr",
            element("th", clip(name, _NAME), scope="row"),
            *(_cell(of_class.get(kind)) for kind, *_ in _KINDS),
        )
        for name, of_class in lost.classes.items()
    ]
    titles = ("Class", *(short for _, _, short, _ in _KINDS))
    table = _table(titles, rows, [], "Kinds of errors by class")
    return join([element("h3", "By class"), table])


def _table(titles: tuple[str, ...], rows: list[Markup], foot: list[Markup], label: str) -> Markup:
    table = element(
        "table",
        element("thead", element("tr", *(element("th", t, scope="col") for t in titles))),
        element("tbody", *rows),
        element("tfoot", *foot) if foot else None,
    )
    box = {"class_": "scroll lost", "role": "region", "aria_label": label, "tabindex": 0}
    return element("div", table, **box)


def _cell(fraction: float | None) -> Markup:
    return element("td", "-" if fraction is None else f"{100 * fraction:.1f}")


def _bar(value: float, most: float) -> Markup:
    """Return a bar as long as the value's share of the largest; the number is beside it."""
    share = max(0.0, min(1.0, value / most)) if most > 0 else 0.0
    return element(
        "svg",
        element("rect", class_="track", width=100, height=1),
        element("rect", width=f"{100 * share:.1f}", height=1),
        class_="bar",
        viewBox="0 0 100 1",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
