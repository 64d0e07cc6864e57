"""YOLOF on ShuffleNetV2 1.0x (arXiv 1807.11164), PASCAL VOC 2007.

python tools/train.py experiments/shufflenetv2_yolof.py
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, backbone="shufflenetv2_x1_0"))
