import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydet.report.line_chart import Axis, Series, line_chart, swatch

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def _curve(chart):
    track = re.search(r'class="curve s0" d="M([^"]*)"', chart)[1]
    return [tuple(map(float, point.split())) for point in track.split("L")]


def _draw(x, y, **axis):
    return line_chart([Series("a", x, y)], Axis("step", 0.0), Axis("loss", **axis), "a curve")


def test_points_lie_where_the_axis_says(read_html):
    chart = _draw([0, 50, 100], [0, 100, 25], low=0.0, high=100.0)
    (x0, y0), (x1, y1), (x2, y2) = _curve(chart)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y2 == pytest.approx((y0 - y1) / 4, abs=0.2)
    # A tick's number is written at the height of its value.
    heights = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', chart))
    assert {v: float(k) - 4 for k, v in heights.items()} == pytest.approx(
        {"0": y0, "25": y2, "50": (y0 + y1) / 2, "75": y2 * 3 - 2 * y0, "100": y1}, abs=0.3
    )
    text = read_html(chart).text
    assert "step" in text
    assert "loss" in text
    assert text.startswith("a curve")


@given(points=st.lists(st.tuples(FINITE, FINITE), max_size=400).map(sorted))
def test_any_numbers_stay_inside(points, read_html):
    chart = _draw([x for x, _ in points], [y for _, y in points])
    read = read_html(chart)
    assert "nan" not in chart
    assert "inf" not in chart
    assert len(read.elements) < 400
    if points:
        for x, y in _curve(chart):
            assert 0 <= x <= 360
            assert 0 <= y <= 230


def test_a_long_curve_is_thinned_to_means():
    x = list(range(2400))
    chart = _draw(x, [float(v % 2) for v in x], low=0.0, high=1.0)
    points = _curve(chart)
    assert len(points) == 240
    middle = (32 + 230 - 42) / 2
    assert all(y == pytest.approx(middle, abs=0.1) for _, y in points)
    assert "dot" not in chart
    assert "dot" in _draw([1], [1])


def test_curves_beyond_the_styles_begin_again():
    assert swatch(1) == swatch(7)
    assert swatch(1) != swatch(2)
