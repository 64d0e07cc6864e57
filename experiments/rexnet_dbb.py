"""The default detector, trained with Diverse Branch Blocks on the 3x3 convs of its backbone.

python tools/train.py experiments/rexnet_dbb.py

Folding (deploy/reparam.py) restores plain convs, so it costs no more than rexnet_yolof.py.
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, expand="dbb", expand_where="3x3"))
