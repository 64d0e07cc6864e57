import unicodedata

import pytest

from tinydet.data.fields import class_name, mark


@pytest.mark.parametrize(
    "text",
    ["café", "  café\t", unicodedata.normalize("NFD", "café"), "\ufeffcafé\u200b", "café\xa0"],
)
def test_class_name__one_form(text):
    assert class_name(text) == "café"


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000", "\u200b \ufeff"])
def test_class_name__nothing_to_be_seen(text):
    assert class_name(text) == ""


def test_class_name__words_are_kept_apart():
    assert class_name("traffic \n light") == "traffic light"
    assert class_name("Cat") != class_name("cat")


@pytest.mark.parametrize(
    ("values", "means"),
    [
        ([1, 2, 1.0, True, "1", " 2 ", "1.0", "yes", "Y", "TRUE", "on"], True),
        ([0, 0.0, False, None, "", "0", "0.0", "no", "N", "False", "off", "Unspecified"], False),
        (["maybe", -1, "-1", "nan", float("nan"), [], [1], {}], None),
    ],
)
def test_mark__what_is_meant(values, means):
    assert [mark(value) for value in values] == [means] * len(values)
