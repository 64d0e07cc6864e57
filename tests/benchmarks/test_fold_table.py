import csv

from fold_row import FoldRow
from fold_table import summary, write_tables

_ROWS = [
    FoldRow(
        *("levit_a", "levit", 224, 50, 4, 3, 7, 1, 5, 2, 2_000_000, 1_000_000, 900_000, 450_000),
        *(2e-13, 3e-6, 1e-6, (), {"a | b": 3, "runs 0 times": 1}, 0, 0, 4.25, 60.0, 16.0, 9.5),
    ),
    FoldRow(
        "levit_b",
        "levit",
        224,
        10,
        1,
        error64=5e-9,
        error32=1e-6,
        kept={"a | b": 1},
        cpu_seconds=2.5,
    ),
    FoldRow("vgg_c", "vgg", error="its process died (SIGKILL)"),
    FoldRow(
        *("vgg_d", "vgg", 128, 8, 0),
        params_before=60_000_000,
        error64=1e-15,
        other_sizes=((160, 192), (123, 131)),
        cpu_seconds=13.0,
        peak_mb=900.0,
        float64_mb=480.0,
    ),
]


def _tables(text):
    """Return each Markdown table in a text as a list of rows of cells."""
    tables, inside = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip()[1:-1].replace("\\|", "/").split("|")]
            if not inside:
                tables.append([])
            tables[-1].append(cells)
        inside = line.startswith("|")
    return tables


def test_summary():
    text = summary(_ROWS)
    assert text.startswith(
        "2 of 4 models of 2 families folded without a problem: 68 -> 5 norms, 7 -> 1 branches, "
        "5 -> 2 scales."
    )
    assert (
        "`fold` took 20 CPU seconds, and 960 MB of memory for 496 MB of weights in float64, all "
        "models added up. 1 of the 2 models of up to 50 M parameters took more than 3 s. "
        "Slowest: vgg_d 13.0 s, levit_a 4.2 s, levit_b 2.5 s."
    ) in text
    families, reasons = _tables(text)
    assert families[2] == [*("levit", "2", "60", "5", "3", "7", "1", "5", "2"), "5e-09", "3e-06"]
    assert families[3] == [*("vgg", "1", "8", "0", "0", "0", "0", "0", "0"), "1e-15", "0e+00"]
    assert families[4][:4] == ["all", "3", "68", "5"]
    assert reasons[2:] == [["4", "a / b"], ["1", "runs 0 times"]]
    assert "- levit_b: differs by 5.0e-09 in float64" in text
    assert "- vgg_c: its process died (SIGKILL)" in text
    assert "vgg_d:" not in text
    assert summary([_ROWS[2]]).startswith("0 of 1 models")


def test_write_tables(tmp_path):
    write_tables(_ROWS, tmp_path)
    assert (tmp_path / "summary.md").read_text() == summary(_ROWS) + "\n"
    (table,) = _tables((tmp_path / "table.md").read_text())
    assert table[2] == [
        *("levit_a", "levit", "224", "50", "4", "3", "7", "1", "5", "2"),
        *("2e-13", "3e-06", "1e-06", "2.00", "1.00", "0.90", "0.45"),
        *("4.2", "60", "16", ""),
    ]
    assert table[3][-4:-1] == ["2.5", "", "0"]
    assert table[4][:3] == ["vgg_c", "vgg", ""]
    assert table[4][-1] == "its process died (SIGKILL)"
    records = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [record["model"] for record in records] == [row.model for row in _ROWS]
    assert records[0]["kept"] == "3 a | b; 1 runs 0 times"
    assert float(records[0]["error64"]) == 2e-13
    assert records[3]["other_sizes"] == "160x192 123x131"
    assert records[1]["problem"] == _ROWS[1].problem
    assert not list(tmp_path.glob("*.tmp"))
