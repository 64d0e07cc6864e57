import json
from dataclasses import replace

import pytest

from tinydet.comparison.cost import Cost
from tinydet.comparison.report import (
    Outcome,
    Report,
    as_json,
    draw_report,
    markdown,
    report_lines,
    write_report,
)
from tinydet.comparison.uncertainty import Difference
from tinydet.comparison.verdict import Verdict, make_verdict
from tinydet.evaluation.tide import KINDS


def _outcome(name, ap50, points=None, ms=9.5):
    found = {}
    if points is not None:
        found = {
            "AP50": Difference(points / 100, 1e-5, (1e-4, 2e-4), 3, 72),
            "AP": Difference(points / 200, 1e-5, (1e-5, 2e-5), 3, 72),
        }
    return Outcome(
        name=name,
        file=f"experiments/{name}.py",
        epochs=22,
        runs=[f"runs/{name}/{n}" for n in (1, 2, 3)],
        scores={"AP50": [ap50 - 0.01, ap50, ap50 + 0.01], "AP": [ap50 / 2] * 3},
        differences=found,
        verdict=make_verdict(found["AP50"], 0.95, 2, "AP50") if found else None,
        lost={kind: (ap50 - 0.7) / (10 + i) for i, kind in enumerate(KINDS)},
        training_speed=0.8 if found else 1.0,
        cost=Cost(1_660_000, 880_000_000, ms, (ms - 0.2, ms + 0.3), ms / 9.5, (0.98, 1.3)),
    )


@pytest.fixture
def report():
    return Report(
        outcomes=[_outcome("plain", 0.8), _outcome("more", 0.9, 10, 11), _outcome("no", 0.8, 0)],
        metric="AP50",
        confidence=0.95,
        budget="5m",
        images=72,
        data="datasets/BCCD (test)",
        timed_on="a machine",
    )


def test_lines(report):
    lines = report_lines(report)
    text = "\n".join(lines)
    assert "plain           3      22  80.0 ± 1.0" in text
    assert f"{100 * 0.1:+.1f} (" in text
    assert "more: better: AP50 " in text
    assert "no: can't tell yet: " in text
    # 0.1 and 0.2 over 10 for classification, over 15 for missed, in points.
    errors = [line.split() for line in lines if line.startswith(("plain", "more "))][2:4]
    assert [(row[0], row[1], row[-1]) for row in errors] == [
        ("plain", "1.00", "0.67"),
        ("more", "2.00", "1.33"),
    ]
    assert "1.16 (0.98 to 1.30)" in text
    assert "each interval has 97.5 %, so that all 2 hold together with 95 %" in text
    assert max(len(line) for line in lines[1:4]) < 140


def test_a_single_idea_has_the_interval_that_was_asked_for(report):
    alone = replace(report, outcomes=report.outcomes[:2])
    assert alone.single_confidence == 0.95
    assert "together" not in "\n".join(report_lines(alone))


def test_markdown(report):
    tables = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables[:5]} == {10}
    assert {line.count("|") for line in tables[5:10]} == {8}
    assert {line.count("|") for line in tables[10:]} == {7}
    assert "- **more** is better: AP50 +" in markdown(report)


def test_json(report):
    content = json.loads(json.dumps(as_json(report), allow_nan=False))
    base, more, _ = content["experiments"]
    assert base["verdict"] is None
    assert more["verdict"]["kind"] == "better"
    found = more["differences"]["AP50"]
    assert found["low"] < found["estimate"] == 0.1 < found["high"]
    assert found["low"], found["high"] == pytest.approx(
        report.outcomes[1].differences["AP50"].interval(0.975)
    )
    assert more["latency_ratio"] == pytest.approx(11 / 9.5)


def test_the_plot_has_every_experiment_its_bars_and_the_front(report):
    (axes,) = draw_report(report).axes
    assert {text.get_text() for text in axes.texts} == {"plain", "more", "no"}
    assert axes.get_xlabel().startswith("milliseconds per image")
    assert axes.get_ylabel().startswith("AP50 in % on BCCD\n(bars: 97.5 % interval")
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["base", "better", "can't tell yet", "Pareto front"]
    segments = [
        s.tolist() for c in axes.collections if hasattr(c, "get_segments") for s in c.get_segments()
    ]
    assert len(segments) == 5  # The base is no uncertain difference.


def test_it_says_that_images_count_as_independent(report):
    for text in ("\n".join(report_lines(report)), markdown(report)):
        assert "video frames" in text


def test_files(report, tmp_path):
    written = write_report(report, tmp_path)
    assert [path.name for path in written] == ["comparison.md", "comparison.json", "comparison.png"]
    assert all(path.stat().st_size for path in written)
    # What was never timed has no plot, and the one of before is gone.
    untimed = [replace(outcome, cost=None) for outcome in report.outcomes]
    written = write_report(replace(report, outcomes=untimed), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "comparison.md"]
    assert len(written) == 2


def test_an_idea_that_never_finished_two_runs(report, tmp_path):
    lost = Outcome(
        "lost", "lost.py", 22, [], {"AP50": [], "AP": []}, {},
        Verdict("can't tell yet", "seed 1 failed: out of memory"),
        {}, None, None,
    )  # fmt: skip
    write_report(replace(report, outcomes=[*report.outcomes, lost]), tmp_path)
    assert "lost: can't tell yet: seed 1 failed" in "\n".join(
        report_lines(replace(report, outcomes=[*report.outcomes, lost]))
    )
