from rich.cells import cell_len

from tinydet.report.table import markdown_table, text_table

ROWS = [("cat", "1.0", "100"), ("猫[b]", "12.5", "-"), ("a long name " * 20, "0", "7")]


def test_text_table__columns_are_aligned_whatever_is_in_them():
    head, *lines = text_table(("class", "AP", "boxes"), ROWS)
    assert head.split() == ["class", "AP", "boxes"]
    for line, (name, *cells) in zip(lines, ROWS, strict=True):
        assert line.startswith(name.rstrip())
        assert line.split()[-2:] == cells
    # Right-aligned: all lines end at the same place of the screen, wide letters counted twice.
    assert len({cell_len(line) for line in (head, *lines)}) == 1


def test_markdown_table__cells_keep_to_their_column():
    lines = markdown_table(("a", "b"), [("x|y", "1\n2")], right=[1])
    assert lines == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 2 |"]
