"""YOLOF on RepVGG-A0 (arXiv 2101.03697), PASCAL VOC 2007; folding merges its branches.

python tools/train.py experiments/repvgg_yolof.py
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, backbone="repvgg_a0"))
