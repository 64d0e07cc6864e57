import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import fold_speed
import numpy as np
import pytest
import torch
from fold_speed import time_forms, time_in_torch

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def repvgg():
    return time_forms("repvgg_a0", size=64, threads=1, repeats=4)


@pytest.mark.slow
def test_time_forms__operators(repvgg):
    # RepVGG-A0: 22 blocks of 3x3 and 1x1, 17 of them with an identity norm that no conv feeds.
    unfolded = {"Conv": 44, "BatchNormalization": 17, "Add": 39}
    folded = {"Conv": 22, "BatchNormalization": 0, "Add": 0}
    assert list(repvgg) == ["unfolded", "timm", "folded"]
    for name, form in repvgg.items():
        expected = unfolded if name == "unfolded" else folded
        assert form.exported == form.optimized == expected, name


@pytest.mark.slow
def test_time_forms__same_function_and_as_many_runs(repvgg):
    for form in repvgg.values():
        assert form.difference < 1e-4
        assert len(form.milliseconds) == 4
        assert min(form.milliseconds) > 0
    assert repvgg["unfolded"].difference == 0
    assert repvgg["folded"].difference > 0  # Not the same file thrice.


@pytest.mark.slow
def test_time_forms__a_wrong_fold_is_seen(monkeypatch):
    right = fold_speed.fold

    def fold(model, images):
        folded, report = right(model, images)
        with torch.no_grad():
            next(p for p in folded.parameters() if p.ndim == 1).add_(1)
        return folded, report

    monkeypatch.setattr(fold_speed, "fold", fold)
    forms = time_forms("test_resnet", size=64, threads=1, repeats=1)
    assert forms["folded"].difference > 1e-2
    assert forms["timm"].difference < 1e-5


def test_time_in_turns__each_is_as_often_first():
    order = []
    calls = {name: partial(order.append, name) for name in "abc"}
    timings = fold_speed._time_in_turns(calls, 6)
    assert Counter(order) == {"a": 9, "b": 9, "c": 9}  # Three runs of each to warm up.
    assert Counter(order[9::3]) == {"a": 2, "b": 2, "c": 2}
    assert all(len(milliseconds) == 6 for milliseconds in timings.values())


def test_optimized__finds_a_norm_behind_a_conv():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        file = fold_speed._export(model, images)
        (output,) = fold_speed._run(fold_speed._session(file, 1), images)
        np.testing.assert_allclose(output, model(images), atol=1e-5)
    assert fold_speed._operators(fold_speed._optimized(file)) == {
        "Conv": 1,
        "BatchNormalization": 0,
        "Add": 0,
    }


@pytest.mark.parametrize("options", [{"size": 0}, {"threads": 0}, {"repeats": 0}])
def test_time_forms__arguments_out_of_range(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        time_forms("resnet18", **options)


def test_time_in_torch(monkeypatch):
    used = []
    right = fold_speed._time_in_turns
    monkeypatch.setattr(
        fold_speed,
        "_time_in_turns",
        lambda *given: used.append(torch.get_num_threads()) or right(*given),
    )
    before = torch.get_num_threads()
    forms = time_in_torch("test_resnet", size=64, threads=before + 1, repeats=2)
    assert used == [before + 1]
    assert torch.get_num_threads() == before
    assert list(forms) == ["unfolded", "timm", "folded"]
    assert 0 < forms["folded"].difference < 1e-5
    assert all(len(form.milliseconds) == 2 for form in forms.values())


def test_time_forms__unknown_model():
    with pytest.raises(ValueError, match="resnit: timm has no such model"):
        time_forms("resnit")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--torch"]], ids=["onnxruntime", "torch"])
def test_command(tmp_path, options):
    script = [
        sys.executable,
        str(_ROOT / "tests/benchmarks/fold_speed.py"),
    ]
    environment = {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [*script, *options, "--size", "64", "--repeats", "1", "test_resnet"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[2:]] == [
        ["test_resnet", "unfolded"],
        ["test_resnet", "timm"],
        ["test_resnet", "folded"],
    ]
