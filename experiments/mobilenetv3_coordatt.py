"""YOLOF on MobileNetV3-L with Coordinate Attention (arXiv 2103.02907) in place of its SE layers.

python tools/train.py experiments/mobilenetv3_coordatt.py
"""

from dataclasses import replace

from mobilenetv3_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, attention="coord", attention_place="se"))
