"""A page read back as a browser's parser sees it, and the fonts that a computer has."""

from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import pytest
from fontTools.ttLib import TTFont

from tinydet.report import fonts


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.elements, self.values, self.text, self.open, self.misfits = [], [], [], [], 0

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value for _, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value for _, value in attrs]

    def handle_endtag(self, tag):
        self.misfits += not self.open or self.open.pop() != tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="session")
def read_html():
    """Return the elements with the names of their attributes, the attributes' values, the text."""

    def read(page):
        reader = _Reader()
        reader.feed(page)
        reader.close()
        assert not reader.open, "elements are left open"
        assert not reader.misfits, "elements are closed in the wrong order"
        return SimpleNamespace(
            elements=reader.elements,
            values=reader.values,
            data=reader.text,
            text="".join(reader.text),
        )

    return read


@pytest.fixture
def no_system_fonts(monkeypatch):
    """A computer that has only matplotlib's fonts."""
    yield from _system_fonts(monkeypatch, [])


@pytest.fixture
def cat_font(monkeypatch, omega_as_cat):
    """A computer with files that are no fonts, and one font that has 猫, drawn as Ω."""
    yield from _system_fonts(monkeypatch, [__file__, "gone-regular.ttf", str(omega_as_cat)])


@pytest.fixture(scope="session")
def omega_as_cat(tmp_path_factory):
    font = TTFont(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap[ord("猫")] = table.cmap[ord("Ω")]
    for record in font["name"].names:
        record.string = "Cat"
    path = tmp_path_factory.mktemp("fonts") / "cat.ttf"
    font.save(path)
    return path


def _system_fonts(monkeypatch, files):
    cached = [f for f in vars(fonts).values() if hasattr(f, "cache_clear")]
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: files)
    yield
    for function in cached:
        function.cache_clear()
