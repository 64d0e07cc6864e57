"""YOLOF on ReXNet-1.0, trained on PASCAL VOC 2007 trainval, evaluated on test: all defaults.

python tools/train.py experiments/rexnet_yolof.py
"""

from tinydet.config import Experiment

experiment = Experiment()
