"""YOLOF on MobileNetV3-L (arXiv 1905.02244), PASCAL VOC 2007.

python tools/train.py experiments/mobilenetv3_yolof.py
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, backbone="mobilenetv3_large_100"))
