import pytest
import torch

from tinydet.deployment import speed_report
from tinydet.deployment.reparameterize import reparameterize_checkpoint
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
    text = _told(checkpoint, fp16=True)
    assert "precision   float16" in text
    assert "folded float16" in text or "folded float32" in text


def test_fp16_that_cannot_run_is_never_silently_swapped(checkpoint, monkeypatch):
    monkeypatch.setattr(speed_report, "half_precision_problem", lambda *_: "no half here")
    text = _told(checkpoint, fp16=True)
    assert "float16 cannot run on this CPU (no half here): float32 was timed" in text
    assert "folded float32" in text
    assert "folded float16" not in text


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


def test_batches_are_full_and_of_the_size(checkpoint):
    assert "batches of 3, 64x96" in _told(checkpoint, batch_size=3, size=(64, 96))
