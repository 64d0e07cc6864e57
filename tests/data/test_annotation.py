import unicodedata

import pytest

from tinydet.data.annotation import RawObject, class_name, parse_annotation, parse_flag

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


CHARACTERS = {"gbk": "猫", "gb2312": "猫", "shift_jis": "猫", "euc-kr": "고양이", "big5": "貓"}
CHARACTERS |= {"utf8": "猫", "utf-32": "猫", "windows-1251": "кот", "iso-2022-jp": "猫"}


@pytest.mark.parametrize(("encoding", "name"), CHARACTERS.items())
def test_parse_annotation__encodings_as_declared(tmp_path, encoding, name):
    text = f"<?xml version='1.0' encoding='{encoding}'?><annotation><object><name>{name}</name>"
    annotation = parse(tmp_path, (text + "</object></annotation>").encode(encoding))
    assert annotation.objects == [RawObject(name, None, "")]


def test_parse_annotation__encodings_declared_wrongly(tmp_path):
    text = "<?xml version='1.0' encoding='{}'?><annotation><object><name>{}</name></object>"
    text += "</annotation>"
    # GBK's characters under the name of its older part; UTF-8 that a text writer calls UTF-16.
    for data, name in (
        (text.format("GB2312", "鎔").encode("gbk"), "鎔"),
        (text.format("utf-16", "猫").encode(), "猫"),
        (text.format("gbk", "猫").encode("utf-8-sig"), "猫"),
    ):
        assert parse(tmp_path, data).objects[0].name == name


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "utf8"])
def test_parse_annotation__refuses_entities_in_any_encoding(tmp_path, encoding):
    for text in (BOMB.removeprefix('<?xml version="1.0"?>'), OUTSIDE):
        text = f'<?xml version="1.0" encoding="{encoding}"?>{text.replace("folder", "猫")}'
        with pytest.raises(ValueError, match="entities"):
            parse(tmp_path, text.encode(encoding))


def test_parse_annotation__case_of_tags(tmp_path):
    annotation = parse(
        tmp_path,
        """<Annotation><Size><Width>500</Width><HEIGHT>375</HEIGHT></Size>
        <Object><Name>cat</Name><Difficult>yes</Difficult><BndBox><XMin>1</XMin><Ymin>2</Ymin>
        <xMax>3</xMax><YMAX>4</YMAX></BndBox></Object></Annotation>""",
    )
    assert annotation.size == (375, 500)
    assert annotation.objects == [RawObject("cat", (1, 2, 3, 4), "yes")]


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
def test_parse_flag__what_is_meant(values, means):
    assert [parse_flag(value) for value in values] == [means] * len(values)


def test_class_name__can_be_written():
    assert class_name("dog \ud83d") == "dog ?"
    assert class_name("dog \U0001f415") == "dog \U0001f415"
