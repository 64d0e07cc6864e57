"""YOLOF on the backbone of YOLOv5s (version 6), PASCAL VOC 2007.

It has no ImageNet weights; --set model.weights=yolov5s.pt reads an official checkpoint.

python tools/train.py experiments/yolov5_yolof.py
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

model = replace(plain.model, backbone="yolov5s", weights="random", freeze_norms=False)
experiment = replace(plain, model=model)
