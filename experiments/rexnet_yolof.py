"""YOLOF on ReXNet-1.0, PASCAL VOC 2007 trainval to train, test to validate: the default everywhere.

python tools/train.py experiments/rexnet_yolof.py
"""

from tinydet.config import Experiment

experiment = Experiment()
