"""torchvision's SSDLite, exported like TinyDet's detectors, as a baseline for speed."""

from __future__ import annotations

from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList

from tinydet.config import Model
from tinydet.deployment.images import random_images
from tinydet.deployment.onnx import export_network
from tinydet.deployment.onnx_detector import RAW
from tinydet.deployment.onnx_selection import with_selection
from tinydet.reparam import fold


def ssdlite(size: tuple[int, int], config: Model) -> tuple[ModelProto, nn.Module]:
    """Return torchvision's SSDLite (arXiv 1801.04381) with random weights as an ONNX model.

    It is folded, and its detections are selected by the same graph with the same thresholds as
    TinyDet's; its default boxes are constants.

    Args:
        size: (H, W) of the input.
        config: thresholds of the selection.

    Returns:
        The ONNX model, and the network in it, (B, 3, H, W) uint8 to scores and boxes.
    """
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    network = _ScoresAndBoxes(model, size).eval()
    folded, _ = fold(network, random_images(1, size))
    images = {0: torch.export.Dim("batch")}
    exported = export_network(folded, random_images(2, size), images, RAW)
    return with_selection(exported, config, network.classes), folded


class _ScoresAndBoxes(nn.Module):
    anchors: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        super().__init__()
        images = torch.zeros(1, 3, *size)
        with torch.no_grad():
            features = list(model.backbone(images).values())
            (anchors,) = model.anchor_generator(ImageList(images, [size]), features)
            self.classes = model.head(features)["cls_logits"].shape[-1] - 1  # without background
        self.backbone: nn.Module = model.backbone
        self.head: nn.Module = model.head
        self.box_coder: BoxCoder = model.box_coder
        self.size = size
        self.register_buffer("anchors", anchors)  # (A, 4)
        mean, std = model.transform.image_mean, model.transform.image_std
        self.register_buffer("mean", 255 * torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images.float() - self.mean) / self.std
        out = self.head(list(self.backbone(x).values()))
        scores = out["cls_logits"].softmax(dim=-1)[..., 1:]  # (B, A, K)
        deltas = out["bbox_regression"]  # (B, A, 4)
        anchors = self.anchors.expand(deltas.shape[0], -1, -1).reshape(-1, 4)
        boxes = self.box_coder.decode_single(deltas.reshape(-1, 4), anchors)
        height, width = self.size
        limit = boxes.new_tensor([width, height, width, height])
        return scores.flatten(1), boxes.reshape(deltas.shape).clamp(min=0).minimum(limit)
