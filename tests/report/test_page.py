import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.evaluation.tide import KINDS, SUMS
from tinydet.evaluation.tide_table import HEADS
from tinydet.report import error_kinds
from tinydet.report.page import render_page, write_page
from tinydet.report.run_files import read_run, train_seconds

JPEG = "/9j/4AAQSkZJRg=="
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


def test_the_page_shows_what_the_run_says(tmp_path, read_html):
    page = write_page(_write(tmp_path)).read_text()
    read = read_html(page)
    for words in (
        *("50.0", "25.0", "12.5", "1.5", "best: 1", "2 of 3 epochs", "tested on 7 images"),
        *("Losses", "Learning rate", "Average precision", "Precision and recall", "Worst images"),
        *("Problems found in the data", "How it was made"),
        *("Where AP50 is lost", "Localisation", "34.0", "12.3", "45.6"),
    ):
        assert words in read.text, words
    assert f"data:image/jpeg;base64,{JPEG}" in read.values
    assert "cell: cell" in read.values  # the image's alternative text
    assert read.elements[0] == ("html", ("lang",))


def test_nothing_is_fetched_or_run(tmp_path, read_html):
    page = write_page(_write(tmp_path)).read_text()
    read = read_html(page)
    names = {tag for tag, _ in read.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    attributes = {name for _, attributes in read.elements for name in attributes}
    assert not {name for name in attributes if name.startswith("on")} | attributes & {"style"}
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in read.values
    every = [set(names) for tag, names in read.elements if tag == "img"]
    assert all("alt" in names for names in every)
    assert all("scope" in names for tag, names in read.elements if tag == "th")
    charts = [names for tag, names in read.elements if tag == "svg" and "role" in names]
    assert page.count("<title>") == 1 + len(charts)  # the page's, and one a chart


@settings(max_examples=60, deadline=None)
@given(word=NASTY)
def test_no_element_and_no_attribute_comes_from_data(word, tmp_path_factory, read_html):
    folder = tmp_path_factory.mktemp("run")
    harmless = render_page(read_run(_write(folder)))
    page = render_page(read_run(_write(folder, name=word, word=word)))
    assert page.isascii()
    assert len(page) < 2_000_000
    assert read_html(page).elements == read_html(harmless).elements


@settings(max_examples=100, deadline=None)
@given(
    file=st.sampled_from(["experiment.json", "metrics.json", "report.json", "sessions.json"]),
    value=JSON
    | st.dictionaries(
        st.sampled_from(
            ["per_class", "curves", "worst", "lost", "data", "notes", "epochs", "model", "a"]
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


def test_the_page_knows_the_kinds_that_are_written():
    names = [name for name, *_ in (*error_kinds._KINDS, *error_kinds._SUMS)]
    assert names == [*KINDS, *SUMS]
    assert [short for _, _, short, _ in error_kinds._KINDS] == [HEADS[kind] for kind in KINDS]


def test_a_run_without_an_evaluation_has_a_page(tmp_path, read_html):
    (tmp_path / "experiment.json").write_text('{"name": "young"}')
    read = read_html(write_page(tmp_path).read_text())
    assert "young" in read.text
    assert "Worst images" not in read.text


def test_lines_that_cannot_be_read_are_counted(tmp_path, read_html):
    log = _write(tmp_path) / "log.jsonl"
    log.write_text(log.read_text() + "<b>half a li")
    assert "1 line of log.jsonl cannot be read" in read_html(write_page(tmp_path).read_text()).text


def test_of_many_classes_the_charts_are_small(tmp_path):
    run = read_run(_write(tmp_path))
    many = replace(run, classes=run.classes * 20)
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
