import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.report.run_folder import find_log, number, read_log, summarize

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = st.sampled_from(["mode", "step", "epoch", "loss", "AP50", "per_class"])
LINES = st.one_of(
    st.binary(max_size=40),
    st.dictionaries(KEYS, JSON | st.sampled_from(["train", "val"])).map(
        lambda record: json.dumps(record).encode()
    ),
)


def _write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _train(step, **more):
    return {"mode": "train", "epoch": 1, "step": step, **more}


def _val(step, **more):
    return {"mode": "val", "epoch": step // 10, "step": step, **more}


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(LINES, max_size=8))
def test_any_file_is_read_and_every_line_counted(lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    path.write_bytes(b"\n".join(lines))
    log = read_log(path)
    for records in (log.train, log.val):
        steps = [record["step"] for record in records]
        assert steps == sorted(set(steps))
    for key in log.keys():  # noqa: SIM118
        steps, values = log.series(key)
        assert len(steps) == len(values) > 0
    assert len(summarize([("a", log, None)])) == 2


def test_half_a_line_is_one_line_lost(tmp_path):
    path = _write(tmp_path / "log.jsonl", _train(10, loss=2.0), _train(20, loss=1.0))
    path.write_text(path.read_text() + '{"mode": "train", "step": 30, "lo')
    log = read_log(path)
    assert log.skipped == 1
    assert log.series("loss") == ([10, 20], [2, 1])


def test_what_a_resumed_run_writes_again_takes_the_place_of_what_was_lost(tmp_path):
    first = [_train(10, loss=5.0), _val(10, AP50=0.1), _train(15, loss=4.0), _train(20, loss=3.0)]
    again = [_val(20, AP50=0.9), _train(12, loss=2.0), _train(20, loss=1.0), _val(20, AP50=0.2)]
    log = read_log(_write(tmp_path / "log.jsonl", *first, *again))
    assert log.series("loss") == ([10, 12, 20], [5, 2, 1])
    assert log.series("AP50") == ([10, 20], [0.1, 0.2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1", None, [1]])
def test_what_is_no_finite_number_is_none(value):
    assert number(value) is None


def test_nesting_too_deep_for_the_parser_is_a_line_lost(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("[" * 100_000 + "\n" + '{"a":' * 100_000)
    assert read_log(path).skipped == 2


def test_summary_names_the_best_epoch_and_the_mean_speed(tmp_path):
    log = read_log(
        _write(
            tmp_path / "log.jsonl",
            _train(10, loss=2.0, images_per_second=10.0),
            _val(10, AP50=0.8, AP=0.5),
            _train(20, loss=1.0, images_per_second=30.0),
            _val(20, AP50=0.7, AP=0.6),
        )
    )
    head, line = summarize([("run", log, 90.0)])
    assert head.split()[0] == "log"
    # 10 images/s for as many images as 30 images/s: 15 on the whole.
    assert line.split() == ["run", "2", "1", "80.00", "50.00", "1", "15.0", "1.5"]


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jsonl: No such file"):
        read_log(tmp_path / "gone.jsonl")


def test_a_runs_folder_is_its_log(tmp_path):
    run = tmp_path / "name" / "1"
    run.mkdir(parents=True)
    log = _write(run / "log.jsonl", _train(10, loss=2.0))
    assert find_log(run) == find_log(log) == log
    assert find_log(tmp_path / "gone") == tmp_path / "gone"  # for `read_log` to name
    with pytest.raises(ValueError, match=r"name: a folder without log\.jsonl; did you mean .*/1\?"):
        find_log(run.parent)
    with pytest.raises(ValueError, match=r"without log\.jsonl; name a run's"):
        find_log(tmp_path)


@given(st.lists(st.tuples(st.sampled_from(["train", "val"]), st.integers(0, 6)), max_size=12))
def test_steps_ascend_and_the_last_written_counts(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    records = [{"mode": mode, "step": s, "loss": i} for i, (mode, s) in enumerate(written)]
    log = read_log(_write(path, *records))
    kept = []
    for mode, step in written:
        # A step is evaluated after it is trained; whoever trains it again evaluates it again.
        kept = [
            (m, s) for m, s in kept if s < step or (s == step and (m, mode) == ("train", "val"))
        ]
        kept.append((mode, step))
    assert [r["step"] for r in log.train] == [s for mode, s in kept if mode == "train"]
    assert [r["step"] for r in log.val] == [s for mode, s in kept if mode == "val"]
