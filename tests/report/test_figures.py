import warnings

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from tinydet.report.figures import (
    Point,
    draw_curves,
    draw_scatter,
    pareto_front,
    plot_curves,
    save_figure,
)
from tinydet.report.run_folder import LogRecords

_POINTS = [
    Point("small", 8.5, 61.0, "VOC2007 test"),
    Point("large", 40.0, 72.5, "VOC2007 test"),
    Point("other", 12.0, 80.0, "shapes test"),
]


def _marks(axes):
    return [tuple(xy) for marks in axes.collections for xy in marks.get_offsets().tolist()]


def test_draw_scatter__marks_and_names_are_where_the_data_says():
    (axes,) = draw_scatter(_POINTS, "ms", "AP50 in %", "a machine").axes
    assert _marks(axes) == [(p.x, p.y) for p in _POINTS]
    assert {name.get_text(): name.xy for name in axes.texts} == {
        p.name: (p.x, p.y) for p in _POINTS
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ms", "AP50 in %")
    assert axes.get_title() == "a machine"


def test_draw_scatter__groups_are_told_only_if_there_are_several():
    (axes,) = draw_scatter(_POINTS, "x", "y").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "VOC2007 test",
        "shapes test",
    ]
    (axes,) = draw_scatter(_POINTS[:2], "x", "y").axes
    assert axes.get_legend() is None


def test_draw_scatter__bars_end_where_they_are_told():
    point = Point("p", 3.0, 50.0, x_bar=(2.5, 4.0), y_bar=(49.0, 53.0))
    (axes,) = draw_scatter([point, Point("q", 4.0, 9.0)], "x", "y").axes
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    assert sorted(segment.tolist() for bar in bars for segment in bar.get_segments()) == [
        [[2.5, 50], [4.0, 50]],
        [[3.0, 49], [3.0, 53]],
    ]


def _slow_front(points):
    return {
        p.name
        for p in points
        if all(
            q.x > p.x or q.y < p.y or (q.x, q.y) == (p.x, p.y) or (q.x == p.x and q.y <= p.y)
            for q in points
        )
    }


def test_pareto_front():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [Point(str(i), *xy) for i, xy in enumerate(rng.integers(0, 5, (8, 2)).tolist())]
        front = pareto_front(points)
        assert {point.name for point in front} == _slow_front(points)
        assert [p.x for p in front] == sorted(p.x for p in front)
        assert [p.y for p in front] == sorted(p.y for p in front)
    assert [p.name for p in pareto_front(_POINTS)] == ["small", "other"]


def test_draw_scatter__the_front_goes_through_its_points():
    (axes,) = draw_scatter(_POINTS, "x", "y", front=True).axes
    (line,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    assert line.get_xydata().tolist() == [[8.5, 61.0], [12.0, 80.0]]
    (axes,) = draw_scatter(_POINTS, "x", "y").axes
    assert not axes.lines


@pytest.mark.parametrize(
    ("xs", "scale"), [((1, 9.9), "linear"), ((1, 10), "log"), ((0, 10), "linear"), ((5,), "linear")]
)
def test_draw_scatter__scale(xs, scale):
    (axes,) = draw_scatter([Point("p", x, 1.0) for x in xs], "x", "y").axes
    assert axes.get_xscale() == scale


def test_draw_scatter__no_name_over_another():
    rng = np.random.default_rng(0)
    points = [
        Point(f"experiment {i}", *xy)
        for i, xy in enumerate(rng.uniform(10, 10.3, (12, 2)).tolist())
    ]
    points += [Point("far", 14.0, 14.0)]
    figure = draw_scatter(points, "x", "y")
    figure.draw_without_rendering()
    boxes = [name.get_window_extent() for name in figure.axes[0].texts]
    assert len(boxes) == 13
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("font", ["a font with it", "no font"])
def test_draw_scatter__names_beyond_latin_are_no_empty_boxes(font, request, tmp_path):
    request.getfixturevalue("cat_font" if font == "a font with it" else "no_system_fonts")
    points = [Point("猫", 1.0, 2.0, "кот"), Point("é", 2.0, 3.0, "猫")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each missing glyph
        save_figure(draw_scatter(points, "猫", "y", "猫"), tmp_path / "plot.png")


def test_draw_scatter__nothing_to_plot():
    with pytest.raises(ValueError, match="no points to plot"):
        draw_scatter([], "x", "y")


def test_save_figure__a_readable_png_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "plot.png"
    save_figure(draw_scatter(_POINTS, "x", "y"), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (960, 600)
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert [p.name for p in path.parent.iterdir()] == ["plot.png"]


def test_save_figure__a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    path.write_text("old")
    figure = draw_scatter(_POINTS, "x", "y")

    def fail(file, **_):
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_save_figure__unknown_ending(tmp_path):
    with pytest.raises(ValueError, match="not the name of a picture"):
        save_figure(draw_scatter(_POINTS, "x", "y"), tmp_path / "plot.docx")


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
        ({"keys": ["AP51"]}, "--keys AP51: not in any log; they have loss, odd"),
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


def test_draw_scatter__names_are_no_formulas(tmp_path):
    points = [Point("a$_$b", 1.0, 2.0, "$_{$"), Point("_b", 2.0, 3.0, "c")]
    save_figure(draw_scatter(points, "x $_$", "y\n$^$"), tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()
