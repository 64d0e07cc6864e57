import pytest

from tinydet.text import read_text


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_read_text__unicode_of_any_kind(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("first é\r\n猫 second\n".encode(encoding))
    assert read_text(path) == "first é\r\n猫 second\n"


def test_read_text__other_encodings_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("first\nsecond\nthird caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: line 3 is not UTF-8 .*save") as error:
        read_text(path)
    assert "\n" not in str(error.value)
    assert "codec" not in str(error.value)
