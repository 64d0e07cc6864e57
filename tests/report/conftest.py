"""A page read back as a browser's parser sees it."""

from html.parser import HTMLParser
from types import SimpleNamespace

import pytest


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
            elements=reader.elements, values=reader.values, text="".join(reader.text)
        )

    return read
