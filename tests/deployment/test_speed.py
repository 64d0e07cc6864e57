import json

import pytest
import torch

from tinydet.deployment import speed
from tinydet.deployment.flops import Count, count
from tinydet.deployment.fold_checkpoint import fold_checkpoint
from tinydet.deployment.images import random_images
from tinydet.deployment.speed import table, time_checkpoint
from tinydet.deployment.timer import Timing
from tinydet.training.device import describe_device


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No large matrix product, and no counting, which takes a second for each network."""
    monkeypatch.setattr(speed, "peak_flops", lambda *_: 1e11)
    monkeypatch.setattr(speed, "count", lambda *_: Count(1, {"Conv2d": 10**8}, {}))


def _report(path, **options):
    settings = {"images": 4, "size": (64, 64), "device": "cpu", **options}
    return "\n".join(time_checkpoint(path, **settings))


@pytest.fixture
def checkpoint(make_checkpoint, detector):
    return make_checkpoint(detector)


def test_table():
    timing = Timing(3, [10.0, 30.0, 20.0], [8.0, 20.0, 14.0])
    first, second = table({"folded": timing, "other": timing}, {"folded": 2e9}, 1e12)[1:]
    # 50 images a second of 2 G operations are 100 G, a tenth of the peak; quartiles are 15 and 25.
    times = ["50.0", "20.00", "30.00", "10.00", "14.00", "6.00"]
    assert first.split() == ["folded", *times, "1.00", "100.0", "10%"]
    assert second.split() == ["other", *times, "-", "-", "-"]


def test_both_forms_on_a_cpu(checkpoint):
    text = _report(checkpoint)
    rows = [line.split()[0] for line in text.splitlines()]
    assert rows[-3:] == ["folded", "unfolded", "4"]
    assert f"folding     {checkpoint}" in text
    assert "100 GFLOP/s in a large float32 matrix product" in text
    assert f"device      {describe_device(torch.device('cpu'))}\n" in text
    assert "timed       forward and post-processing, no data loading; wall clock" in text
    assert "64x64" in text
    assert "random images" in text


def test_no_fuse_times_the_unfolded_form_alone(checkpoint):
    rows = [line.split()[0] for line in _report(checkpoint, fuse=False).splitlines()]
    assert "unfolded" in rows
    assert "folded" not in rows


def test_deploy_checkpoint(checkpoint):
    text = _report(fold_checkpoint(checkpoint).path)
    assert "folded already" in text
    assert "unfolded" not in text


def test_time_limit_is_report(checkpoint):
    text = _report(checkpoint, images=500, time_limit=0.001)
    assert "10 of 500 images timed" in text


def test_fp16_on_a_cpu_is_explained(checkpoint):
    text = _report(checkpoint, precision="float16")
    assert "precision   float16" in text
    assert "folded (float16)" in text or "folded (float32)" in text


def test_fp16_that_cannot_run_is_never_silently_swapped(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "precision_problem", lambda *_: "no half here")
    out = tmp_path / "figures.json"
    text = _report(checkpoint, precision="float16", out=out)
    assert json.loads(out.read_text())["precision"] == "float32"
    assert "GFLOP/s in a large float32 matrix product" in text
    assert "float16 cannot run on this CPU (no half here): float32 was timed" in text
    assert "folded (float32)" in text
    assert "folded (float16" not in text


def test_all_candidates_in_one_table(checkpoint, exported, folded, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    # Exporting takes seconds, and all of these are the same network.
    monkeypatch.setattr("tinydet.deployment.onnx.export_detector", lambda *_: exported)
    monkeypatch.setattr(speed, "count", count)
    other, file = tmp_path / "other.pt", tmp_path / "other.onnx"
    other.write_bytes(checkpoint.read_bytes())
    onnx.save(exported, file)
    out = tmp_path / "figures.json"
    options = {"backend": "all", "beside": (other, file), "channels_last": True, "out": out}
    text = _report(checkpoint, precision="bfloat16", **options)
    figures = json.loads(out.read_text())
    rows = figures["forms"]
    layout = "bfloat16, channels_last"
    assert set(rows) == {
        *(f"folded ({layout})", f"unfolded ({layout})", f"{other} ({layout})"),
        *("folded (ONNX)", f"{other} (ONNX)", str(file)),
    }
    assert all(name in text for name in rows)
    for name, row in rows.items():
        assert row["images"] == 4
        assert 0 < row["forward_ms"] < row["median_ms"] <= row["p95_ms"]
        # The file alone does not tell how much it computes.
        assert (row["gflops"] > 0) == (name != str(file))
    expected = 2 * count(folded, random_images(1, (64, 64))).multiply_adds
    row = rows["folded (ONNX)"]
    assert row["gflops"] == pytest.approx(expected * row["images_per_second"] / 1e9)


def test_files_beside_of_a_fixed_size_and_none(checkpoint, exported_fixed, tmp_path):
    onnx = pytest.importorskip("onnx")
    fixed, none = tmp_path / "fixed.onnx", tmp_path / "none.onnx"
    onnx.save(exported_fixed, fixed)
    none.write_bytes(b"no protobuf")
    assert str(fixed) in _report(checkpoint, beside=(fixed,), fuse=False)  # 64x64 is padded
    with pytest.raises(ValueError, match=r"fixed\.onnx: an input of 96x96 for a file of 64x96"):
        _report(checkpoint, beside=(fixed,), fuse=False, size=(96, 96))
    with pytest.raises(ValueError, match=r"none\.onnx: not an ONNX file"):
        _report(checkpoint, beside=(none,), fuse=False)
    with pytest.raises(ValueError, match=r"--out .*fixed\.onnx: is .* itself"):
        _report(checkpoint, beside=(fixed,), out=fixed)


def test_compiled_beside_not_compiled(checkpoint, monkeypatch):
    """Compiling takes a minute; here it is only recorded."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    text = _report(checkpoint, compile=True)
    assert "folded (float32, compiled)" in text
    assert "unfolded (float32, compiled)" in text
    assert len(compiled) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "--images"),
        ({"size": (64, 70)}, "multiples of 32"),
        ({"time_limit": -1.0}, "--time-limit"),
        ({"device": "cuda:99"}, "device cuda:99"),
        ({"backend": "onnxruntime", "precision": "bfloat16"}, "--bf16: is for torch"),
        ({"backend": "onnxruntime", "channels_last": False}, "--channels-last: is for torch"),
        ({"backend": "onnxruntime", "compile": True}, "--compile: is for torch"),
    ],
)
def test_wrong_options(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        _report(checkpoint, **options)


def test_operations_are_counted_once_for_each_shape(detector, monkeypatch):
    counted = []

    def count_once(detector, batch):
        counted.append(tuple(batch.shape))
        return count(detector, batch)

    monkeypatch.setattr(speed, "count", count_once)
    batches = [random_images(1, size) for size in [(64, 64), (64, 128)] * 3]
    one, two = (2 * count(detector, batch).multiply_adds for batch in batches[:2])
    assert speed._operations(detector, batches) == pytest.approx((one + two) / 2)
    assert sorted(counted) == [(1, 3, 64, 64), (1, 3, 64, 128)]


def test_batches_are_full_and_of_the_size(checkpoint):
    assert "batches of 3, 64x96" in _report(checkpoint, batch_size=3, size=(64, 96))
