import json

import pytest
import torch

from tinydet.deployment import speed_report
from tinydet.deployment.flops import count
from tinydet.deployment.images import random_images
from tinydet.deployment.onnx import export_checkpoint
from tinydet.deployment.reparameterize import fold_detector, reparameterize_checkpoint
from tinydet.deployment.speed_report import SpeedOptions, time_checkpoint


def _told(path, **options):
    settings = {"images": 4, "size": (64, 64), "device": "cpu", **options}
    return "\n".join(time_checkpoint(path, None, SpeedOptions(**settings)))


@pytest.fixture
def checkpoint(make_checkpoint, detector):
    return make_checkpoint(detector)


def test_both_forms_on_a_cpu(checkpoint):
    text = _told(checkpoint)
    rows = [line.split()[0] for line in text.splitlines()]
    assert rows[-3:] == ["folded", "unfolded", "4"]
    assert f"folding     {checkpoint}" in text
    assert "GFLOP/s in a large float32 matrix product" in text
    assert f"CPU, {torch.get_num_threads()} threads" in text
    assert "wall clock" in text
    assert "64x64" in text
    assert "random images" in text


def test_no_fuse_times_the_unfolded_form_alone(checkpoint):
    rows = [line.split()[0] for line in _told(checkpoint, fuse=False).splitlines()]
    assert "unfolded" in rows
    assert "folded" not in rows


def test_deploy_checkpoint(checkpoint):
    text = _told(reparameterize_checkpoint(checkpoint).path)
    assert "folded already" in text
    assert "unfolded" not in text


def test_time_limit_is_told(checkpoint):
    text = _told(checkpoint, images=500, time_limit=0.001)
    assert "10 of 500 images timed" in text


def test_fp16_on_a_cpu_is_explained(checkpoint):
    text = _told(checkpoint, precision="float16")
    assert "precision   float16" in text
    assert "folded (float16)" in text or "folded (float32)" in text


def test_fp16_that_cannot_run_is_never_silently_swapped(checkpoint, monkeypatch):
    monkeypatch.setattr(speed_report, "precision_problem", lambda *_: "no half here")
    text = _told(checkpoint, precision="float16")
    assert "float16 cannot run on this CPU (no half here): float32 was timed" in text
    assert "folded (float32)" in text
    assert "folded (float16" not in text


def test_all_candidates_in_one_table(make_checkpoint, small_detector, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    checkpoint = make_checkpoint(small_detector)
    other, file = tmp_path / "other.pt", tmp_path / "other.onnx"
    other.write_bytes(checkpoint.read_bytes())
    export_checkpoint(checkpoint, file, (64, 64))
    out = tmp_path / "figures.json"
    options = {"backend": "all", "others": (other, file), "channels_last": True, "out": out}
    text = _told(checkpoint, precision="bfloat16", **options)
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
    expected = 2 * count(fold_detector(small_detector)[0], random_images(1, (64, 64))).multiply_adds
    folded = rows["folded (ONNX)"]
    assert folded["gflops"] == pytest.approx(expected * folded["images_per_second"] / 1e9)


def test_compiled_beside_not_compiled(checkpoint, monkeypatch):
    """Compiling takes a minute and torch's word is taken for it: here it only marks the form."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    text = _told(checkpoint, compile=True)
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
    ],
)
def test_wrong_options(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        _told(checkpoint, **options)


def test_operations_are_counted_once_for_each_shape(small_detector, monkeypatch):
    counted = []

    def count_once(detector, batch):
        counted.append(tuple(batch.shape))
        return count(detector, batch)

    monkeypatch.setattr(speed_report, "count", count_once)
    batches = [random_images(1, size) for size in [(64, 64), (64, 128)] * 3]
    one, two = (2 * count(small_detector, batch).multiply_adds for batch in batches[:2])
    assert speed_report._operations(small_detector, batches) == pytest.approx((one + two) / 2)
    assert sorted(counted) == [(1, 3, 64, 64), (1, 3, 64, 128)]


def test_batches_are_full_and_of_the_size(checkpoint):
    assert "batches of 3, 64x96" in _told(checkpoint, batch_size=3, size=(64, 96))
