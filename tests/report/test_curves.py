import warnings

import pytest
from matplotlib.figure import Figure

from tinydet.report.curves import draw_curves, plot_curves
from tinydet.report.run_log import LogRecords


def _log(shift=0.0):
    return LogRecords(
        train=[{"step": s, "loss": 1.0 / s + shift, "odd$key": 1} for s in (10, 20, 30)],
        val=[{"step": 30, "AP50": 0.5}],
    )


def _draw(*arguments):
    figure = Figure()
    draw_curves(figure, *arguments)
    return figure


def test_a_panel_a_key_and_a_curve_a_log():
    figure = _draw([_log(), _log(1.0)], ["a", "b"], ["loss", "AP50"], "both")
    losses, precisions = figure.axes
    assert [list(line.get_ydata()) for line in losses.lines] == [
        [0.1, 0.05, 1 / 30],
        [1.1, 1.05, 1 + 1 / 30],
    ]
    assert [list(line.get_xydata()[0]) for line in precisions.lines] == [[30, 50]] * 2
    assert precisions.get_ylabel() == "AP50 (%)"
    assert precisions.get_xlabel() == "step"
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["a", "b"]
    first, second = losses.lines
    assert first.get_color() != second.get_color()
    assert first.get_linestyle() != second.get_linestyle()


def test_a_legend_may_name_every_curve():
    figure = _draw([_log(), _log()], ["a1", "a2", "b1", "b2"], ["loss", "AP50"])
    names = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in figure.axes]
    assert names == [["a1", "b1"], ["a2", "b2"]]


def test_names_are_no_formulas(tmp_path):
    out = tmp_path / "curves.svg"
    plot_curves([_log()], ["$\\frac"], ["odd$key"], title="$x_", out=out)
    assert "<svg" in out.read_text()


@pytest.mark.parametrize("font", ["a font with it", "no font"])
def test_names_beyond_latin_draw_no_empty_box(font, request, tmp_path):
    request.getfixturevalue("cat_font" if font == "a font with it" else "no_system_fonts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each missing glyph
        plot_curves([_log()] * 2, ["猫", "кот"], ["loss"], "猫é", out=tmp_path / "curves.png")


@pytest.mark.parametrize("style", ["default", "ggplot", "dark", "whitegrid"])
def test_styles_of_matplotlib_and_seaborn_are_known(style, tmp_path):
    out = tmp_path / "curves.svg"
    plot_curves([_log()], ["a"], ["loss"], style=style, out=out)
    assert "<svg" in out.read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"keys": ["AP51"]}, "--keys AP51: in none of the logs; they have loss, odd"),
        ({"legend": ["a", "b"]}, "--legend has 2 names for 1 logs"),
        ({"style": "none"}, "--style none: not one of"),
        ({"backend": "none"}, "--backend none"),
        ({"out": None, "backend": "agg"}, "--out FILE"),
    ],
)
def test_mistakes_are_named(change, says, tmp_path):
    given = {"legend": ["a"], "keys": ["loss"], "out": tmp_path / "a.png"} | change
    with pytest.raises(ValueError, match=says):
        plot_curves([_log()], **given)
