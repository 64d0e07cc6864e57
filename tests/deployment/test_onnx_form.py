"""The two halves of a file together find what the file finds."""

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tinydet.config import Data
from tinydet.deployment.images import random_images
from tinydet.deployment.onnx import export_detector
from tinydet.deployment.onnx_form import OnnxForm
from tinydet.deployment.reparameterize import fold_detector
from tinydet.deployment.runtime import open_session, unpack


def test_both_halves_are_the_whole(detector):
    model = export_detector(fold_detector(detector)[0], Data())
    form = OnnxForm(model)
    images = random_images(2, (96, 64))
    parts = form.select(*form(images), (96, 64))
    whole = open_session(model).run(None, {"images": images.numpy()})
    for part, value in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.from_numpy(part), torch.from_numpy(value))
    assert min(len(found.scores) for found in unpack(*map(torch.from_numpy, parts))) > 3


def test_mistakes_are_told(small_detector, tmp_path):
    model = export_detector(fold_detector(small_detector)[0], Data(), (64, 64), nms=False)
    with pytest.raises(ValueError, match="without --no-nms"):
        OnnxForm(model)
    with pytest.raises(ValueError, match=r"none\.onnx: no such file"):
        OnnxForm(tmp_path / "none.onnx")
