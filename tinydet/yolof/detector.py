"""The detector: images in, losses or detections out.

B images, A anchors, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinydet.backbones.frozen import keep_fixed
from tinydet.config import Model
from tinydet.yolof.anchors import make_anchors
from tinydet.yolof.decode import (
    Detections,
    decode_boxes,
    place_in_images,
    postprocess,
    sizes_in_input,
)
from tinydet.yolof.loss import pad_targets, yolof_losses
from tinydet.yolof.matcher import uniform_match


class Detector(nn.Module):
    """YOLOF (arXiv 2103.09460) on one feature map of a backbone.

    The input are raw pixels; normalization with the backbone's mean and std is part of the model.

    Attributes:
        backbone: maps (B, 3, H, W) to a list of one feature map.
        encoder: the dilated encoder.
        head: maps encoder features to cls_logits and deltas.
        classes: class names in label order.
        stride: stride of the feature map in pixels of the input.
        config: the experiment's model configuration.
        fixed: names of the backbone's frozen modules, which stay in eval mode.
        norms_without_statistics: names of norms that have to be calibrated before training
            (`tinydet.reparam.unfold`).
        mean: (1, 3, 1, 1), of pixels in 0..255.
        std: (1, 3, 1, 1), of pixels in 0..255.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        encoder: nn.Module,
        head: nn.Module,
        classes: Sequence[str],
        stride: int,
        mean: Sequence[float],
        std: Sequence[float],
        config: Model,
        fixed: Sequence[str] = (),
    ) -> None:
        """Assemble the parts; `mean` and `std` are the backbone's, for pixels in 0..1."""
        super().__init__()
        self.backbone = backbone
        self.encoder = encoder
        self.head = head
        self.classes = tuple(classes)
        self.stride = stride
        self.config = config
        self.fixed = tuple(fixed)
        self.norms_without_statistics: tuple[str, ...] = ()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1) * 255, persistent=False)
        keep_fixed(backbone, self.fixed)

    def train(self, mode: bool = True) -> Detector:
        """Set training or eval mode; frozen modules stay in eval mode."""
        super().train(mode)
        keep_fixed(self.backbone, self.fixed)
        return self

    @property
    def anchor_sides(self) -> tuple[float, ...]:
        """Sides of the square anchors of each cell in pixels."""
        return tuple(scale * self.stride for scale in self.config.anchor_scales)

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor] | tuple[dict[str, Tensor], Tensor]:
        """Return raw outputs, or the losses if targets are given.

        Args:
            images: (B, 3, H, W) RGB in 0..255, uint8 or float; H and W multiples of 32.
            targets: for each image `boxes` (N, 4) xyxy pixels and `labels` (N,) int64; N may be 0.

        Returns:
            cls_logits (B, A, K) and deltas (B, A, 4), float32; with targets, a dict of the scalars
            `loss_cls` and `loss_box`, and the number of positives by which they are normalized.
        """
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        (features,) = self.backbone(x)
        cls_logits, deltas = self.head(self.encoder(features))
        if targets is None:
            return cls_logits, deltas
        # In full precision: IoUs and sums over all anchors are inaccurate in half precision.
        with torch.autocast(images.device.type, enabled=False):
            return self.losses(cls_logits, deltas, _size(images), targets)

    def anchors(self, image_size: tuple[int, int]) -> Tensor:
        """Return the (A, 4) xyxy anchors for an input of (H, W) pixels."""
        height, width = (-(-side // self.stride) for side in image_size)
        return make_anchors(height, width, self.stride, self.anchor_sides, self.mean.device)

    def losses(
        self,
        cls_logits: Tensor,
        deltas: Tensor,
        image_size: tuple[int, int],
        targets: Sequence[dict[str, Tensor]],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses of raw outputs, as `forward` does; call it outside autocast.

        Args:
            cls_logits: (B, A, K) float32.
            deltas: (B, A, 4) float32.
            image_size: (H, W) of the network input.
            targets: boxes and labels of each image, as in `forward`.
        """
        anchors = self.anchors(image_size)
        pred_boxes = decode_boxes(anchors, deltas, self.config.center_clamp)
        gt_boxes, gt_labels, gt_valid = pad_targets(targets)
        matches = uniform_match(
            anchors,
            pred_boxes,
            gt_boxes,
            gt_valid,
            self.config.match_topk,
            self.config.match_pos_ignore,
            self.config.match_neg_ignore,
        )
        return yolof_losses(cls_logits, pred_boxes, gt_boxes, gt_labels, matches)

    @torch.inference_mode()
    def detect(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> list[Detections]:
        """Detect objects in a batch.

        Args:
            images: (B, 3, H, W) RGB in 0..255; H and W multiples of 32.
            sizes: (H, W) of each original image; boxes are clipped to it, before NMS.
            scales: (sy, sx) of each image, network pixels per original pixel; boxes are divided
                by it. Without `sizes` and `scales` boxes are in pixels of the network input.
        """
        cls_logits, deltas = self(images)
        limits = sizes_in_input(images, sizes, scales)
        detections = self.select(cls_logits, deltas, _size(images), limits)
        return place_in_images(detections, sizes, scales)

    def select(
        self,
        cls_logits: Tensor,
        deltas: Tensor,
        image_size: tuple[int, int],
        limits: Sequence[tuple[float, float]] | None = None,
    ) -> list[Detections]:
        """Decode and select detections from raw outputs, in pixels of the network input.

        Args:
            cls_logits: (B, A, K).
            deltas: (B, A, 4).
            image_size: (H, W) of the network input.
            limits: (H, W) of each image within it, without padding, to which boxes are clipped
                before NMS; None for the whole input.
        """
        config, anchors = self.config, self.anchors(image_size)
        limits = limits or [image_size] * len(cls_logits)
        return [
            postprocess(
                logits,
                decode_boxes(anchors, moves, config.center_clamp),
                limit,
                config.score_threshold,
                config.candidates,
                config.nms_iou,
                config.max_detections,
            )
            for logits, moves, limit in zip(cls_logits, deltas, limits, strict=True)
        ]


def _size(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return height, width
