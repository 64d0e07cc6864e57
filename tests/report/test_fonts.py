"""Which font has a text's letters, read from the fonts themselves by fontTools."""

import pytest
from fontTools.ttLib import TTFont

from tinydet.report.fonts import class_names, drawable, font_families, font_for


@pytest.mark.usefixtures("cat_font")
@pytest.mark.parametrize("text", ["cat 0.5", "é", "кот", "γάτα", "chat é Ж", "猫 0.87", "猫é"])
def test_a_font_has_every_letter(text):
    font = font_for(text, 20)
    assert set(map(ord, text)) <= set(TTFont(font.path).getBestCmap())
    assert font.size == 20
    assert drawable(text) == text


@pytest.mark.usefixtures("cat_font")
def test_all_classes_have_names(caplog):
    assert class_names(("猫", "кот", "cat")) == ("猫", "кот", "cat")
    assert not caplog.messages


@pytest.mark.usefixtures("no_system_fonts")
def test_without_a_font():
    assert drawable("猫\tΩ ") == "? Ω"
    assert class_names(("кот", "猫")) == ("кот", "1")
    assert font_families(["猫", "é"])[-1] == "DejaVu Sans"


@pytest.mark.usefixtures("cat_font")
def test_matplotlib_gets_the_families_that_texts_need():
    assert font_families(["a", "猫"])[-2:] == ["DejaVu Sans", "Cat"]
