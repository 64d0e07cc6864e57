"""SSDLite as we export it is torchvision's."""

import pytest
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tinydet.config import Model
from tinydet.deployment.images import random_images
from tinydet.deployment.onnx_detector import RAW, SplitOnnxDetector
from tinydet.deployment.ssdlite_baseline import ssdlite


@pytest.mark.slow
def test_every_detection_of_torchvision_is_there():
    torch.manual_seed(0)
    model, network = ssdlite((320, 320), Model())
    torch.manual_seed(0)  # The same random weights again.
    peer = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    images = random_images(2, (320, 320))
    with torch.inference_mode():
        expected = peer([image / 255 for image in images])
        scores, boxes = network(images)
    found = [torch.from_numpy(value) for value in SplitOnnxDetector(model)(images)]
    for name, one, other in zip(RAW, (scores, boxes), found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-3, msg=name)
    scores = scores.unflatten(1, (boxes.shape[1], -1))  # (B, A, K)
    for image, detections in enumerate(expected):
        assert len(detections["scores"]) > 10
        for box, label, score in zip(
            detections["boxes"], detections["labels"], detections["scores"], strict=True
        ):
            same_box = (boxes[image] - box).abs().amax(dim=1) < 1e-2
            same_score = (scores[image, :, label - 1] - score).abs() < 1e-5
            assert (same_box & same_score).any()
