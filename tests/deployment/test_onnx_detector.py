"""Exported detectors in ONNX Runtime: whole, and cut in two."""

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tinydet.deployment.agreement import compare_detections  # noqa: E402
from tinydet.deployment.images import random_images  # noqa: E402
from tinydet.deployment.onnx_detector import (  # noqa: E402
    OnnxDetector,
    SplitOnnxDetector,
    open_session,
    unpack,
)


def test_a_file_without_the_sizes_of_images_clips_in_the_end(exported):
    older = onnx.ModelProto()
    older.CopyFrom(exported)
    del older.graph.input[1]
    images, sizes = random_images(2, (96, 128)), [(60, 128), (96, 70)]
    for found, size in zip(OnnxDetector(older).detect(images, sizes), sizes, strict=True):
        assert len(found.scores) > 3
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert (found.boxes <= torch.tensor([*size[::-1]] * 2)).all()


@pytest.mark.parametrize("sizes", [None, [(60, 128), (96, 70)]])
def test_a_box_in_the_padding_takes_no_place(exported, folded, sizes):
    images = random_images(2, (96, 128))
    found, expected = (d.detect(images, sizes) for d in (OnnxDetector(exported), folded))
    agreement = compare_detections(expected, found, folded.config)
    assert agreement.unmatched == 0
    assert agreement.matched > 80  # Without padding, 50 an image: all it may find.


def test_a_fixed_size_pads_what_is_smaller_and_refuses_what_is_larger(exported, exported_fixed):
    fixed, free = OnnxDetector(exported_fixed), OnnxDetector(exported)
    assert (fixed.size, free.size) == ((64, 96), None)
    images = random_images(2, (64, 64))
    padded = torch.full((2, 3, 64, 96), 114, dtype=torch.uint8)
    padded[:, :, :, :64] = images
    for a, b in zip(fixed.detect(images), free.detect(padded, [(64, 64)] * 2), strict=True):
        assert len(a.scores) > 3
        torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="96x64 for a file of 64x96: export"):
        fixed.detect(random_images(1, (96, 64)))


def test_both_halves_are_the_whole(exported):
    split, images = SplitOnnxDetector(exported), random_images(2, (96, 64))
    parts = split.select(*split(images), (96, 64))
    whole = open_session(exported).run(None, {"images": images.numpy()})
    for part, value in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.from_numpy(part), torch.from_numpy(value))
    assert min(len(found.scores) for found in unpack(*map(torch.from_numpy, parts))) > 3


def test_a_missing_file(tmp_path):
    for load in (OnnxDetector, SplitOnnxDetector):
        with pytest.raises(ValueError, match=r"none\.onnx: no such file"):
            load(tmp_path / "none.onnx")


def test_both_halves_of_a_fixed_size_pad_what_is_smaller(exported_fixed):
    split, images = SplitOnnxDetector(exported_fixed), random_images(2, (64, 64))
    padded = torch.full((2, 3, 64, 96), 114, dtype=torch.uint8)
    padded[:, :, :, :64] = images
    for part, whole in zip(split(images), split(padded), strict=True):
        torch.testing.assert_close(torch.from_numpy(part), torch.from_numpy(whole))
    with pytest.raises(ValueError, match="96x64 for a file of 64x96: export"):
        split(random_images(1, (96, 64)))


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no protobuf")
    for load in (OnnxDetector, SplitOnnxDetector):
        with pytest.raises(ValueError, match=r"a\.onnx: "):
            load(tmp_path / "a.onnx")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_the_gpu_that_was_asked_for_or_none(exported, monkeypatch, device):
    """Without a GPU: ONNX Runtime says that it has one, and then uses the CPU without a word."""
    import onnxruntime

    asked = []
    session = onnxruntime.InferenceSession

    def fall_back(content, options, providers, provider_options):
        asked.append((providers, provider_options))
        return session(content, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ValueError, match=f"device {device}: ONNX Runtime cannot use it"):
        open_session(exported, device)
    ids = {"cuda": {}, "cuda:0": {"device_id": 0}, "cuda:1": {"device_id": 1}}
    assert asked == [(["CUDAExecutionProvider"], [ids[device]])]
