import pytest

from tinydet.data.annotation import RawObject, parse_annotation

BOMB = """<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]><annotation><folder>&b;</folder></annotation>"""
OUTSIDE = """<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>
<annotation><folder>&a;</folder></annotation>"""


def parse(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_annotation(path)


def test_parse_annotation__values_as_written(tmp_path):
    annotation = parse(
        tmp_path,
        """<annotation><size><width>500</width><height>375</height></size>
        <object><name> cat </name><difficult>1</difficult>
          <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>
          </bndbox></part>
          <bndbox><xmax>195</xmax><xmin>48.5</xmin><ymax>371</ymax><ymin>240</ymin></bndbox>
        </object>
        <object><name>dog</name><bndbox><xmin>nan</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>
        </bndbox></object></annotation>""",
    )
    assert annotation.size == (375, 500)
    assert annotation.objects == [
        RawObject("cat", (48.5, 240.0, 195.0, 371.0), "1"),
        RawObject("dog", None, ""),
    ]


@pytest.mark.parametrize("text", [BOMB, OUTSIDE, BOMB.encode("utf-16")])
def test_parse_annotation__refuses_entities(tmp_path, text):
    with pytest.raises(ValueError, match="entities"):
        parse(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    ["", "<annotation>", "<html/>", b"\xff\xfe\x00", b"<?xml version='1.0' encoding='x'?><a/>"],
)
def test_parse_annotation__refuses_what_is_no_annotation(tmp_path, text):
    with pytest.raises(ValueError, match=r"not XML|not a VOC"):
        parse(tmp_path, text)
