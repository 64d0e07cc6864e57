"""Backbones: one factory over timm, and models that timm lacks, registered with timm."""

# Imported for the models they register.
from tinydet.backbones import modifications, repvgg, resnet_caffe, shufflenetv2, yolov5

__all__ = ["modifications", "repvgg", "resnet_caffe", "shufflenetv2", "yolov5"]
