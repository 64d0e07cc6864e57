"""The default detector with ACON-C activations (arXiv 2009.04759) in its backbone.

python tools/train.py experiments/rexnet_acon.py
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(plain, model=replace(plain.model, activation="acon-c"))
