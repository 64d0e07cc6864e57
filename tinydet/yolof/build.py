"""From an experiment's model to a detector with its weights."""

from __future__ import annotations

from collections.abc import Sequence

from tinydet.backbones.factory import create_backbone
from tinydet.backbones.modifications import apply_modifications
from tinydet.config import Model
from tinydet.yolof.detector import Detector
from tinydet.yolof.encoder import DilatedEncoder
from tinydet.yolof.head import Head
from tinydet.yolof.pretrained import load_trained, read_trained


def build_detector(config: Model, classes: Sequence[str]) -> Detector:
    """Build the detector of an experiment, in training mode.

    Raises:
        ConfigError: the backbone does not exist, lacks the feature, the stage or a place for a
            modification, or its weights are not available.
    """
    trained = read_trained(config, build_detector)
    weights, tensors = config.weights, None
    if trained is not None and trained.same_backbone:
        weights = "random"  # They are loaded below, with those of its branches and new layers.
    elif trained is not None:
        tensors = trained.backbone()
    backbone = create_backbone(
        config.backbone, weights, config.feature, config.freeze_stages, tensors
    )
    encoder = DilatedEncoder(
        backbone.channels, config.encoder_channels, config.encoder_mid_channels, config.dilations
    )
    head = Head(
        config.encoder_channels,
        len(classes),
        len(config.anchor_scales),
        config.cls_convs,
        config.reg_convs,
    )
    detector = Detector(
        apply_modifications(backbone.module, config, backbone.fixed),
        encoder,
        head,
        classes,
        backbone.stride,
        backbone.mean,
        backbone.std,
        config,
        backbone.fixed,
    )
    if trained is not None:
        load_trained(detector, trained)
    return detector
