"""YOLOF on EfficientNet-Lite0, PASCAL VOC 2007; whose weights are also available as a package.

python tools/train.py experiments/efficientnet_lite0_yolof.py
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, backbone="tf_efficientnet_lite0"))
