import json
import textwrap
from dataclasses import replace
from itertools import islice

import gpu
import gpu_training
import pytest
import torch
from gpu_process import Outcome, run_part
from gpu_sizes import SMALL
from gpu_speed import run_onnxruntime, time_compiled, time_forward, time_selection
from gpu_tests import run_tests
from gpu_training import compare_losses, kill_and_resume, largest_difference, time_training

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (compare_losses, {"step", "loss here", "largest relative difference"}),
        (time_training, {"dtype", "img/s", "loop : bare", "peak MB"}),
        (time_forward, {"network", "form", "dtype", "memory format", "median ms", "peak MB"}),
        (time_compiled, {"network"}),
        (time_selection, {"agreement"}),
    ],
)
def test_every_part_runs_in_small(part, names):
    rows = list(part(CPU, replace(SMALL, train_dtypes=("float32",), train_steps=1)))
    assert names <= rows[-1].keys()
    json.dumps(rows, allow_nan=False)


@pytest.mark.slow
def test_onnx_runtime_finds_what_torch_finds():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    *times, agreement = run_onnxruntime(CPU, replace(SMALL, batches=(2,)))
    assert len(times) == 2
    assert " 0 differ" in agreement["agreement"]


@pytest.mark.slow
def test_a_killed_training_ends_like_another():
    rows = list(kill_and_resume(CPU, SMALL))
    assert [row["of the checkpoint"] for row in rows][:3] == ["model", "raw_model", "optimizer"]
    assert all(row["equal"] for row in rows)
    assert 0 < rows[0]["killed after step"] < rows[0]["steps"]


def test_losses_too_far_apart_fail_and_are_told(monkeypatch):
    monkeypatch.setattr(gpu_training, "_ALLOWED", {1: -1.0})
    rows = compare_losses(CPU, replace(SMALL, loss_steps=1))
    assert next(rows)["step"] == 1
    with pytest.raises(RuntimeError, match="up to step 1"):
        next(rows)


def test_largest_difference():
    one = {"a": [torch.tensor([1.0, 2.0]), 3], "b": {"c": None, "d": "x"}, "e": torch.zeros(0)}
    one["betas"] = (0.9, 0.999)
    assert largest_difference(one, one) == 0
    assert largest_difference(one, {**one, "a": [torch.tensor([1.0, 2.5]), 3]}) == 0.5
    assert largest_difference(one, {**one, "a": [torch.tensor([1.0, torch.nan]), 3]}) == torch.inf
    for other in ({**one, "b": {}}, {**one, "b": {"c": 1, "d": "x"}}, {**one, "a": [3]}):
        assert largest_difference(one, other) == torch.inf


def test_the_outcome_of_each_test_is_told(tmp_path):
    (tmp_path / "test_some.py").write_text(
        textwrap.dedent("""
        import pytest
        pytestmark = pytest.mark.gpu
        def test_good(): pass
        def test_bad(): assert 1 == 2, "one is not two"
        def test_left_out(): pytest.skip("no card")
        """)
    )
    rows = run_tests(CPU, SMALL, tmp_path)
    found = {row["test"]: (row["outcome"], row["first line"]) for row in islice(rows, 3)}
    assert found["test_good"] == ("passed", "")
    assert found["test_bad"][0] == "failure"
    assert "one is not two" in found["test_bad"][1]
    assert found["test_left_out"] == ("skipped", "no card")
    with pytest.raises(RuntimeError, match="1 of 3"):
        next(rows)


PARTS = """
import os, signal, time

def raises(device, sizes):
    yield {"device": str(device), "runs": sizes.runs, "not a number": float("nan")}
    raise KeyError("second line\\nis not told")

def hangs(device, sizes):
    yield {"a": 1}
    time.sleep(600)

def dies(device, sizes):
    yield {"a": 1}
    os.kill(os.getpid(), signal.SIGSEGV)

def ends(device, sizes):
    print("said")
    yield {"a": 1}
"""


def test_a_part_cannot_harm_the_others(tmp_path, monkeypatch):
    (tmp_path / "made_up_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    import made_up_parts as parts

    raised = run_part(parts.raises, "cpu", SMALL, 300)
    assert raised.rows == [{"device": "cpu", "runs": SMALL.runs, "not a number": "nan"}]
    assert raised.error.startswith("KeyError: ")
    assert any("in raises" in line for line in raised.output)
    died = run_part(parts.dies, "cpu", SMALL, 300)
    assert (died.rows, died.error) == ([{"a": 1}], "its process ended with exit status -11")
    ended = run_part(parts.ends, "cpu", SMALL, 300)
    assert (ended.rows, ended.error, ended.output) == ([{"a": 1}], "", ["said"])
    hung = run_part(parts.hangs, "cpu", SMALL, 0.1)
    assert hung.error.startswith("stopped at its limit")


@pytest.mark.parametrize("error", ["", "RuntimeError: it is | broken"])
def test_what_the_parts_found_is_written_after_each(tmp_path, monkeypatch, capsys, error):
    outcomes = {
        gpu.compare_losses: Outcome([{"step": 1, "loss": 0.5}], error, ["a traceback"], 2.0),
        gpu.time_selection: Outcome([{"name": "x", "ok": True}, {"ms": 1.0}], seconds=3.0),
    }
    written = []

    def run_part(part, device, sizes, seconds):
        assert (device, sizes) == ("cpu", SMALL)
        assert 0 < seconds <= 540
        path = tmp_path / "out" / "gpu.json"
        written.append(len(json.loads(path.read_text())["parts"]) if path.is_file() else 0)
        return outcomes[part]

    monkeypatch.setattr(gpu, "run_part", run_part)
    arguments = ["--device", "cpu", "--out", str(tmp_path / "out"), "--only", "losses", "selection"]
    assert gpu.main(arguments) == bool(error)
    assert written == [0, 1]
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["parts"]["losses"]["error"] == error
    assert content["parts"]["selection"]["rows"] == [{"name": "x", "ok": True}, {"ms": 1.0}]
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "| 1 | 0.5 |" in page
    assert "| x | yes | - |" in page
    assert ("**Failed**: RuntimeError" in page) == ("a traceback" in page) == bool(error)
    assert ("FAILED" in capsys.readouterr().out) == bool(error)


def test_parts_that_time_does_not_allow_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_part", None)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "0.01", "--only", "tests"]
    assert gpu.main(arguments) == 1
    assert "not run" in (tmp_path / "gpu.md").read_text()
