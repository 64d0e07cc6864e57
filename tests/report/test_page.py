import json
import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from tinydet.evaluation.tide import KINDS, SUMS
from tinydet.report.page import DASHES, line_charts, render_page, write_page
from tinydet.report.run_folder import read_run, train_seconds

JPEG = "/9j/4AAQSkZJRg=="
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NASTY = st.one_of(
    st.text(min_size=1, max_size=30),
    st.sampled_from(
        ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'a\ud800\x00"]
    ),
    st.just("<" * 100_000),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NASTY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NASTY, inner, max_size=3),
    max_leaves=5,
)


def _write(folder, name="tiny", word="cell", **files):
    """Write a small run whose every string holds a word."""
    content = {
        "experiment.json": {
            "name": name,
            "model": {"backbone": word},
            "train": {"epochs": 3},
            word: word,
        },
        "metrics.json": {
            "AP50": 0.5,
            "AP50_11pt": 0.25,
            "AP": 0.125,
            "epochs": 2,
            "best_epoch": 1,
            "images": 7,
            "boxes": 9,
            "train_seconds": 90,
            "images_per_second": 12.5,
            "per_class": {word: {"AP50": 0.5, "AP50_11pt": None, "AP": 0.125, "boxes": 9}},
        },
        "report.json": {
            "notes": [word],
            "data": [{"split": word, "problems": [word]}],
            "curves": {word: [1.0] * 60 + [0.0] * 41},
            "lost": {
                "all": {"localisation": 0.34, "missed": 0.17, word: 0.1},
                "sizes": {"small": {"localisation": 0.123}, word: {}},
                "classes": {word: {"localisation": 0.456, "missed": None}},
            },
            "worst": [
                {"name": word, "caption": word, "jpeg": JPEG, "width": 640, "height": 480},
            ],
            "best": [{"name": word, "caption": word, "jpeg": JPEG, "width": 64, "height": 48}],
        },
        "sessions.json": [{"command": word, "git": word, "torch": word}],
    }
    for file, value in {**content, **files}.items():
        (folder / file).write_text(json.dumps(value))
    log = [
        {"mode": "train", "epoch": 1, "step": 10, "loss": 2.0, "lr": 0.1, f"loss{word}": 1.0},
        {"mode": "val", "epoch": 1, "step": 10, "AP50": 0.5, "AP": 0.125},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


@pytest.fixture(scope="module")
def quick_charts():
    """Charts, which take longest, are made of numbers alone and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tinydet.report.page.line_charts",
            lambda charts, *_, **__: [Markup("<svg></svg>")] * len(charts),
        )
        yield


def test_the_page_shows_what_the_run_says(tmp_path, read_html):
    page = write_page(_write(tmp_path)).read_text()
    read = read_html(page)
    for words in (
        *("50.0", "25.0", "12.5", "1.5", "best: 1", "2 of 3 epochs", "tested on 7 images"),
        *("Losses", "Learning rate", "Average precision", "Precision and recall"),
        *("Images", "Worst", "Best"),
        *("Problems found in the data", "How to reproduce it"),
        *("Where AP50 is lost", "Localisation", "34.0", "12.3", "45.6"),
    ):
        assert words in read.text, words
    assert f"data:image/jpeg;base64,{JPEG}" in read.values
    assert "cell: cell" in read.values  # the image's alternative text
    assert read.elements[0] == ("html", ("lang",))
    assert '<ul class="legend"></ul>' in page  # of the learning rate: hidden on phones


def test_nothing_is_fetched_or_run(tmp_path, read_html):
    page = write_page(_write(tmp_path)).read_text()
    read = read_html(page)
    names = {tag for tag, _ in read.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    attributes = {name for _, attributes in read.elements for name in attributes}
    assert not {name for name in attributes if name.startswith("on")}
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in read.values
    every = [set(names) for tag, names in read.elements if tag == "img"]
    assert all("alt" in names for names in every)
    assert all("scope" in names for tag, names in read.elements if tag == "th")
    assert page.count('class="chart"') == page.count('role="img" aria-label="') == 4
    links = re.findall(r'href="([^"]*)"', page)
    assert {link[1:] for link in links} <= set(re.findall(r' id="([^"]*)"', page))


@pytest.mark.usefixtures("quick_charts")
@settings(max_examples=50, deadline=None)
@given(word=NASTY)
@example(word="<script>alert(1)</script>")
@example(word='"><img src=x onerror=alert(1)>')
@example(word="'a\ud800\x00\u202e")
@example(word="{{ 7 * 7 }}")
def test_no_element_and_no_attribute_comes_from_data(word, tmp_path_factory, read_html):
    folder = tmp_path_factory.mktemp("run")
    harmless = render_page(read_run(_write(folder)))
    page = render_page(read_run(_write(folder, name=word, word=word)))
    assert page.isascii()
    assert len(page) < 2_000_000
    read = read_html(page)
    assert read.elements == read_html(harmless).elements
    assert not re.search(r"[\x00-\x08]|&#(8238|55296);", page)
    if word.isprintable() and len(word) < 60:
        assert read.text.count(word) >= 10


@pytest.mark.usefixtures("quick_charts")
@settings(max_examples=100, deadline=None)
@given(
    file=st.sampled_from(["experiment.json", "metrics.json", "report.json", "sessions.json"]),
    value=JSON
    | st.dictionaries(
        st.sampled_from(
            [
                "per_class",
                "curves",
                "worst",
                "best",
                "lost",
                "data",
                "notes",
                "epochs",
                "model",
                "a",
            ]
        ),
        JSON | st.lists(st.dictionaries(st.sampled_from(["jpeg", "width", "split"]), JSON)),
    ),
)
def test_any_content_of_a_file_makes_a_page(file, value, tmp_path_factory, read_html):
    folder = _write(tmp_path_factory.mktemp("run"), **{file: value})
    assert ("h1", ()) in read_html(write_page(folder).read_text()).elements


def test_an_image_that_is_no_jpeg_in_base64_is_not_shown(tmp_path, read_html):
    for jpeg in ('/9j/" onload="a', "data:text/html,x", "PHN2Zz4=", "/9j/<"):
        worst = [{"name": "a", "caption": "b", "jpeg": jpeg, "width": 1, "height": 1}]
        page = write_page(_write(tmp_path, **{"report.json": {"worst": worst}})).read_text()
        assert not [tag for tag, _ in read_html(page).elements if tag == "img"]


def test_kinds_of_errors_have_bars_by_what_they_cost(tmp_path):
    page = write_page(_write(tmp_path)).read_text()
    bars = re.findall(r'<rect class="track"[^>]*/><rect width="([0-9.]+)"', page)
    assert bars == ["0.0", "100.0", "0.0", "0.0", "0.0", "50.0"]  # of the largest


def test_a_run_of_before_kinds_of_errors_has_a_page(tmp_path, read_html):
    page = write_page(_write(tmp_path, **{"report.json": {"curves": {}}})).read_text()
    assert "Where AP50 is lost" not in read_html(page).text
    assert "By class" not in read_html(page).text


def test_every_kind_of_error_is_on_the_page(tmp_path, read_html):
    lost = {kind: i / 1000 for i, kind in enumerate((*KINDS, *SUMS), 111)}
    page = write_page(_write(tmp_path, **{"report.json": {"lost": {"all": lost}}})).read_text()
    text = read_html(page).text
    for kind, value in lost.items():
        assert kind in text.lower()
        assert f"{100 * value:.1f}" in text


def test_a_run_without_an_evaluation_has_a_page(tmp_path, read_html):
    (tmp_path / "experiment.json").write_text('{"name": "young"}')
    read = read_html(write_page(tmp_path).read_text())
    assert "young" in read.text
    assert "Worst images" not in read.text


def test_lines_that_cannot_be_read_are_counted(tmp_path, read_html):
    log = _write(tmp_path) / "log.jsonl"
    log.write_text(log.read_text() + "<b>half a li")
    assert "1 unreadable line of log.jsonl" in read_html(write_page(tmp_path).read_text()).text


def test_of_many_classes_the_charts_are_small(tmp_path):
    run = read_run(_write(tmp_path))
    many = replace(run, classes=run.classes * 7)
    assert 'class="charts small"' not in render_page(run)
    assert 'class="charts small"' in render_page(many)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"not a run's folder"):
        read_run(tmp_path)
    _write(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json: cannot be read"):
        read_run(tmp_path)
    assert train_seconds(tmp_path) is None
    assert train_seconds(_write(tmp_path)) == 90


def test_the_same_run_makes_the_same_page_whenever_it_is_made(tmp_path, monkeypatch):
    run = read_run(_write(tmp_path))
    page = render_page(run)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12345678")
    assert render_page(run) == page


def _chart(curves, *labels, **options):
    return line_charts([curves], *labels, **options)[0]


def _curve(svg, color="c0"):
    """The points of a chart's curve, in pixels."""
    path = re.search(rf'<path d="M ([^"]*)" style="fill: none;[^"]*stroke: var\(--{color}\)', svg)
    return [tuple(map(float, point.split())) for point in path[1].split("L")]


def test_line_charts__points_lie_where_the_axes_say(read_html):
    svg = _chart([([0, 50, 100], [0, 100, 25])], "step", "loss <a>", top=100)
    (x0, y0), (x1, y1), (x2, y2) = _curve(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y2 == pytest.approx((y0 - y1) / 4, abs=0.2)
    # The number of a tick is written at the height of its value.
    texts = re.findall(r'end; fill: var\(--quiet\)" x="[^"]*" y="([\d.]+)">([\d.]+)<', svg)
    heights = {number: float(y) for y, number in texts}
    middle = heights["0"] - y0  # from a letter's base line to its middle
    assert {number: y - middle for number, y in heights.items()} == pytest.approx(
        {"0": y0, "25": y2, "50": (y0 + y1) / 2, "75": y2 * 3 - 2 * y0, "100": y1}, abs=0.3
    )
    assert {"step", "loss <a>"} <= set(read_html(svg).data)


def test_line_charts__every_curve_has_its_color_and_dashes():
    svg = _chart([([0, 1], [i, i]) for i in range(len(DASHES))], "x", "y")
    for i, dashes in enumerate(DASHES):
        (style,) = re.findall(rf'style="(fill: none;[^"]*stroke: var\(--c{i}\)[^"]*)"', svg)
        found = re.search(r"stroke-dasharray: ([^;]*)", style)
        assert tuple(map(float, found[1].split(",")) if found else ()) == dashes
        assert f"fill: var(--c{i})" in svg  # its dots
    assert not re.search("#[0-9a-f]{6}", svg)


@settings(max_examples=25, deadline=None)
@given(points=st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=400).map(sorted))
@example(points=[(1.0, 1e308), (1e308, -1e308)])
@example(points=[(0.0, 5e-324)])
@pytest.mark.filterwarnings("error")
def test_line_charts__any_numbers_stay_inside(points, read_html):
    svg = _chart([([x for x, _ in points], [y for _, y in points])], "step", "loss")
    assert "nan" not in svg
    assert "inf" not in svg
    assert len(read_html(svg).elements) < 400
    if len(points) > 1:
        for x, y in _curve(svg):
            assert 0 <= x <= 360
            assert 0 <= y <= 230


def test_line_charts__a_long_curve_is_reduced_to_means():
    x = list(range(2400))
    points = _curve(_chart([(x, [v % 2 + v / 1e4 for v in x])], "x", "y"))
    assert len(points) <= 240
    slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
    for a, b in points:
        assert b == pytest.approx(points[0][1] + slope * (a - points[0][0]), abs=0.2)


def test_line_charts__charts_of_one_call_are_those_of_a_call_each():
    charts = [[([0, 1, 2], [i, 10, 20])] for i in range(3)]
    assert line_charts(charts, "x", "y", filled=True, top=20) == [
        _chart(curves, "x", "y", filled=True, top=20) for curves in charts
    ]
