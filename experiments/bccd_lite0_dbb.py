"""BCCD with Diverse Branch Blocks on 3x3 and 5x5 convs, in the training time of bccd_lite0.py.

python tools/train.py experiments/bccd_lite0_dbb.py --seed 0
"""

from dataclasses import replace

from bccd_lite0 import experiment as plain

experiment = replace(
    plain,
    model=replace(plain.model, expand="dbb", expand_where="3x3 5x5"),
    train=replace(plain.train, epochs=3, eval_every=3),
)
