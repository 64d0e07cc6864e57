"""The default detector with Coordinate Attention (arXiv 2103.02907) in place of its SE layers.

python tools/train.py experiments/rexnet_coordatt.py
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, attention="coord", attention_place="se"))
