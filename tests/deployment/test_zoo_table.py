import pytest

from tinydet.deployment.zoo_table import ExperimentRow, accuracy_points, markdown, write_zoo
from tinydet.report.figures import Point


def test_markdown__what_was_not_measured_is_a_dash():
    rows = [
        ExperimentRow(
            "a", "a.py", "run a", (32, 64), 2_000_000, 1_500_000, 3 * 10**9, 10**9, latency_ms=4.5
        ),
        ExperimentRow("b", "b.py", "run b", error="ValueError: no"),
    ]
    lines = markdown(rows, "a machine").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "`run" in line]
    assert cells == [
        ["a", "32x64", "2.00", "1.50", "3.00", "1.00", "4.50", "-", "-", "`run a`"],
        ["b", *["-"] * 8, "`run b`"],
    ]
    assert "a machine" in lines[0]
    assert lines[-1] == "- b: ValueError: no"


def test_accuracy_points__only_measured_rows(tmp_path):
    rows = [
        ExperimentRow("a", "", "", latency_ms=4.0, ap50=[0.5], data="VOC"),
        ExperimentRow("b", "", "", latency_ms=4.0),
        ExperimentRow("c", "", "", ap50=[0.5]),
        ExperimentRow("d", "", "", latency_ms=9.0, ap50=[0.0, 0.02], data="VOC"),
    ]
    a, d = accuracy_points(rows)
    assert a == Point("a", 4.0, 50.0, "VOC")
    assert (d.name, d.x, d.y, d.group) == ("d", 9.0, 1.0, "VOC")
    assert d.y_bar == pytest.approx((1 - 2**0.5, 1 + 2**0.5))
    assert len(write_zoo(rows, "", tmp_path)) == 3
    assert len(list(tmp_path.iterdir())) == 3
