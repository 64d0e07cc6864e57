"""Backbones: one factory over timm, and the models timm does not have, registered with timm."""

# Importing them registers them.
from tinydet.backbones import repvgg, shufflenetv2, variants, yolov5

__all__ = ["repvgg", "shufflenetv2", "variants", "yolov5"]
