"""The default detector, whose ReXNet trains with Diverse Branch Blocks on its 3x3 convs.

python tools/train.py experiments/rexnet_dbb.py

Folding (deploy/reparam.py) leaves ReXNet's own convs: the same cost as experiments/rexnet_yolof.py.
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, expand="dbb", expand_where="3x3"))
