from hypothesis import given
from hypothesis import strategies as st

from tinydet.report.html import Markup, clip, element, join, text

NASTY = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            '" onload="alert(1)',
            "' x='",
            "</style><img src=x>",
            "&lt;b&gt;",
            "]]><!--",
            "\x00\x1b[31m\u202eabc\ud800",
        ]
    ),
)


@given(content=NASTY, value=NASTY)
def test_what_comes_from_data_is_one_text_and_one_value(read_html, content, value):
    page = element("p", content, element("b", "x"), title=value)
    assert page.isascii()
    read = read_html(page)
    assert read.elements == [("p", ("title",)), ("b", ())]
    if (content + value).isprintable():
        assert read.text == content + "x"
        assert read.values == [value]


def test_elements_nest_and_attributes_are_spelt_as_html_does():
    made = element(
        "div", element("br"), None, 1.5, class_="a", aria_label="b", hidden=True, title=None
    )
    assert made == '<div class="a" aria-label="b" hidden><br>1.5</div>'
    assert element("path", d="M0 0") == '<path d="M0 0"/>'
    assert join(["<", Markup("<b>")]) == "&lt;<b>"
    assert text("é\u202e") == "&#233;&#65533;"


@given(content=st.text(max_size=50), length=st.integers(1, 40))
def test_clipped_text_keeps_its_ends(content, length):
    short = clip(content, length)
    assert len(short) <= length
    if len(content) <= length:
        assert short == content
    elif length > 2:
        assert short[0] == content[0]
        assert short[-1] == content[-1]
